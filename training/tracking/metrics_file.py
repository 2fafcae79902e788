"""metrics.jsonl: one JSON object per line, whole lines only, whatever the disk does."""

from __future__ import annotations

import errno
import json
import logging
import os
from io import FileIO
from pathlib import Path
from typing import Any

from pixelprune.files import write_whole
from training.errors import RankError, side_write

METRICS_FILE = "metrics.jsonl"

logger = logging.getLogger(__name__)


class MetricsFile:
    """Appends rows. A row that the disk does not take ends the run in one line, or is missing and said to be.

    Unbuffered: what `append` returned from is with the operating system. A row that was written in part is cut off.
    """

    def __init__(self, folder: Path, rows: list[dict[str, Any]], *, go_on: bool):
        """Starts with `rows`, in place of what is there. go_on: whether training outlives a row that finds no room."""
        self.path, self.go_on = folder / METRICS_FILE, go_on
        self._file: FileIO | None = None
        self._end = self._num_missing = 0
        with side_write("metrics", go_on=go_on):
            write_whole(self.path, "".join(json.dumps(row) + "\n" for row in rows).encode())
            self._file = FileIO(self.path, "r+")
            self._end = self._file.seek(0, os.SEEK_END)

    def append(self, row: dict[str, Any]) -> None:
        """Raises RankError if it cannot be written, unless `go_on`."""
        line = json.dumps(row).encode() + b"\n"
        try:
            self._write(line)
        except OSError as error:
            if not self.go_on:
                raise RankError(
                    f"{self.path}: the row of step {row.get('step')} cannot be written: {error.strerror or error} "
                    "(free space, or go on without such rows with checkpoint.on_error=continue)"
                ) from error
            if not self._num_missing:
                logger.error(
                    "%s: cannot be written: %s; going on without the rows from step %s (checkpoint.on_error=continue)",
                    self.path, error.strerror or error, row.get("step"),
                )  # fmt: skip
            self._num_missing += 1
            return
        self._end += len(line)
        self._report_missing()

    def close(self) -> None:
        self._report_missing()
        if self._file is not None:
            self._file.close()

    def _write(self, line: bytes) -> None:
        if self._file is None:
            raise OSError(errno.EIO, "it could not be opened")
        self._file.seek(self._end)
        try:
            rest = memoryview(line)
            while rest:
                rest = rest[self._file.write(rest) or 0 :]
        except OSError:
            self._file.truncate(self._end)  # the next row must not continue half a line
            raise

    def _report_missing(self) -> None:
        if self._num_missing:
            logger.error("%s: %d rows are missing, they could not be written", self.path, self._num_missing)
            self._num_missing = 0


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """All whole rows of a run's metrics.jsonl. A last line that a kill cut short is left out, a damaged one said."""
    path = folder / METRICS_FILE
    if not path.exists():
        return []
    *whole, _ = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(whole, 1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                raise ValueError("no row of metrics")
        except ValueError as error:
            logger.warning("%s: line %d is damaged and left out (%s)", path, number, error)
        else:
            rows.append(row)
    return rows
