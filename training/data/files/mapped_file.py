"""A file that a library maps into memory, held against its length: one that shrinks ends its readers by a signal."""

from __future__ import annotations

import os
from pathlib import Path

from training.errors import UserError

__all__ = ["MappedFile"]


class MappedFile:
    """A mapped file and how long it was when it was mapped.

    Touching a page behind the end of a file that somebody has shortened is SIGBUS, without a word, and nothing in
    Python can answer that: so the length is looked at before each read. What shortens the file between the look and
    the read still ends the process.
    """

    def __init__(self, path: Path | str, name: str = ""):
        """name: what the user knows it by. Raises OSError for a file that is not there."""
        self.path, self.name = path, name or str(path)
        self.num_bytes = os.stat(path).st_size

    def check(self) -> None:
        """Raises UserError where the file has become shorter. One that was removed is still there for who mapped it."""
        try:
            num_bytes = os.stat(self.path).st_size
        except FileNotFoundError:
            return
        if num_bytes < self.num_bytes:
            raise UserError(
                f"{self.name}: the file has become shorter since it was opened: it had {self.num_bytes} bytes and has "
                f"{num_bytes}; start again with the file as it is meant to be"
            )
