"""The consoles of all commands: text is text."""

from __future__ import annotations

from rich.console import Console

__all__ = ["plain_console"]


def plain_console(*, stderr: bool = False, width: int | None = None, quiet: bool = False) -> Console:
    """A console that prints names and messages as they are: [brackets] are no markup, `:name:` is no emoji.

    Style comes from `style=` and rich's Text. width: of the terminal where it is not given.
    """
    return Console(stderr=stderr, width=width, quiet=quiet, markup=False, emoji=False, highlight=False)
