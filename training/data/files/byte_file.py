"""Byte ranges of a data file, read when they are asked for, from the file that was there when it was opened."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

from pixelprune.images.image_file import open_regular
from training.errors import UserError

__all__ = ["ByteFile"]


class ByteFile:
    """Picklable: a worker opens the file again. path, name: what is read, and what the user knows it by.

    Read, not mapped: a mapped file that somebody shortens ends the process by a signal (SIGBUS), without a word.
    """

    def __init__(self, path: Path, name: str):
        self.path, self.name = path, name
        self._file: BinaryIO | None = None

    def read(self, start: int, end: int) -> bytes:
        """Bytes [start, end). Raises UserError for a file that has become shorter, or cannot be read any more."""
        try:
            if self._file is None:
                self._file = open_regular(self.path)
            data = os.pread(self._file.fileno(), end - start, start)
        except OSError as error:
            raise UserError(f"{self.name}: the data file cannot be read any more: {error.strerror}") from error
        if len(data) < end - start:
            raise UserError(
                f"{self.name}: the data file has become shorter since it was opened: a record ended at byte {end}, the "
                f"file ends at {start + len(data)}; start again with the file as it is meant to be"
            )
        return data

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_file": None}
