"""A number that a process and one that it has started both see."""

from __future__ import annotations

import mmap
import os
from multiprocessing import reduction
from typing import Any

__all__ = ["SharedWord"]

NUM_BYTES = 8


class SharedWord:
    """A whole number of 63 bits, read and written in one piece. Pickled to a process that is being started.

    In memory alone: the standard library's shared values are files, for which a disk may have no room.
    """

    def __init__(self) -> None:
        self._file = os.memfd_create("word")
        os.ftruncate(self._file, NUM_BYTES)
        self._open()

    def _open(self) -> None:
        self._word = memoryview(mmap.mmap(self._file, NUM_BYTES)).cast("q")

    @property
    def value(self) -> int:
        return self._word[0]

    @value.setter
    def value(self, number: int) -> None:
        self._word[0] = number

    def close(self) -> None:
        """Hand it to no more processes; it can be read and written still."""
        os.close(self._file)

    def __getstate__(self) -> Any:
        return reduction.DupFd(self._file)  # type: ignore[attr-defined, unused-ignore]

    def __setstate__(self, file: Any) -> None:
        self._file = file.detach()
        self._open()
        self.close()
