"""How a command ends: its exit code, and one line where something is the user's to change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rich.text import Text

from pixelprune.command.console import plain_console
from pixelprune.files import path_meant

__all__ = ["INTERRUPTED", "USER_ERROR", "print_error", "run_command"]

USER_ERROR = 2
"""Wrong arguments, or data that cannot be used: the line on stderr says what, and the way out."""

INTERRUPTED = 130
"""Ctrl-C, as shells report it."""


def run_command(do: Callable[[], int | None], *, expected: tuple[type[Exception], ...] = (ValueError, OSError)) -> int:
    """Do a command's work and return its exit code, 0 where `do` returns None.

    expected: errors that are the user's; others are faults of this program and keep their traceback.
    """
    try:
        return do() or 0
    except expected as error:
        print_error(error)
        return USER_ERROR
    except KeyboardInterrupt:
        plain_console(stderr=True).print("stopped")
        return INTERRUPTED


def print_error(error: Exception | str) -> None:
    """One line on stderr; text in [brackets] is text. A name that is not Unicode is shown with its bytes escaped."""
    line = _said_of_a_file(error) if isinstance(error, OSError) and isinstance(error.filename, str) else str(error)
    line = line.encode("utf-8", "backslashreplace").decode()
    plain_console(stderr=True).print(Text.assemble(("error:", "bold red"), f" {line}"), soft_wrap=True)


def _said_of_a_file(error: OSError) -> str:
    """Which file, what about it, and what was probably meant; without the system's number for it."""
    line = f"{error.filename}: {error.strerror}"
    meant = path_meant(Path(error.filename)) if isinstance(error, FileNotFoundError) else None
    return f"{line}; did you mean {meant}?" if meant else line
