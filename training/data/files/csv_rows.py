"""Records of a .csv file in place: a header, then a record a row, cells with commas or line breaks in quotes.

A cell is text; in the columns that hold turns, lists and objects it is JSON, in `weight` a number. An empty cell means
absent.
"""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from pixelprune.records.record import RecordError, of_the_record
from training.data.files.byte_file import ByteFile
from training.data.files.json_rows import MAX_RECORD_BYTES, SCAN_BYTES, check_size

__all__ = ["CsvRows"]

JSON_COLUMNS = frozenset(
    ("conversations", "messages", "prompt", "completion", "history", "images", "image", "tools", "objects", "metadata",
     "bbox", "bboxes", "weight")
)  # fmt: skip
"""Columns that may hold something else than text, which is then JSON."""
_TEXT_UNLESS_JSON = ("prompt", "completion", "images", "image")

# A cell may hold a screenshot as base64 text; the default is 128 KiB.
csv.field_size_limit(MAX_RECORD_BYTES)


class CsvRows:
    """Records of one CSV file. Picklable. path, name: as in `JsonRows`."""

    def __init__(self, path: Path, name: str = ""):
        self.path = path
        self.name = name or str(path)
        spans = _row_spans(path)
        self.columns = _header(path, spans, self.name)
        self.spans = spans[1:]
        self._bytes = ByteFile(path, self.name)

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, row: int) -> Any:
        """The row by column, without its empty cells. Raises RecordError (invalid_csv, record_too_large); UserError as
        `ByteFile.read`."""
        start, end = map(int, self.spans[row])
        check_size(end - start)
        data = self._bytes.read(start, end)
        with of_the_record():
            try:
                cells = _cells(data)
            except (ValueError, csv.Error) as error:
                raise RecordError("invalid_csv", f"not a row of CSV: {error}") from error
            if len(cells) != len(self.columns):
                raise RecordError("invalid_csv", f"{len(cells)} cells, the header has {len(self.columns)}")
            return {name: _value(name, cell) for name, cell in zip(self.columns, cells, strict=True) if cell}

    def where(self, row: int) -> str:
        return f"{self.name}, record {row + 1}"


def _cells(row: bytes) -> list[str]:
    rows = list(csv.reader(io.StringIO(row.decode("utf-8-sig"), newline=""), strict=True))
    if len(rows) != 1:
        raise ValueError(f"{len(rows)} rows where quotes have one")
    return rows[0]


def _header(path: Path, spans: np.ndarray, name: str) -> list[str]:
    """The names of the columns; none of an empty file. Raises ValueError for names that are none."""
    if not len(spans):
        return []
    with path.open("rb") as file:
        head = file.read(int(spans[0, 1]))
    try:
        columns = _cells(head[spans[0, 0] :])
    except (ValueError, csv.Error) as error:
        raise ValueError(f"source {name}: its header is not a row of CSV: {error} (sources[].path)") from error
    if "" in columns or len(set(columns)) < len(columns):
        raise ValueError(f"source {name}: columns {columns}, expected names that differ (sources[].path)")
    return columns


def _value(column: str, cell: str) -> Any:
    looks_like_json = cell.lstrip()[:1] in ("[", "{")
    if column not in JSON_COLUMNS or (column in _TEXT_UNLESS_JSON and not looks_like_json):
        return cell
    try:
        return json.loads(cell)
    except (ValueError, RecursionError) as error:
        if column in _TEXT_UNLESS_JSON:
            return cell  # a question may begin with a bracket
        raise RecordError("invalid_csv", f"column {column}: {cell!r:.60} is not JSON ({error})") from error


def _row_spans(path: Path) -> np.ndarray:
    """Byte ranges int64 (n, 2) of the rows that are not blank: line feeds inside quotes end none."""
    ends, offset, is_quoted = [], 0, False
    with path.open("rb") as file:
        while chunk := file.read(SCAN_BYTES):
            codes = np.frombuffer(chunk, dtype=np.uint8)
            # A doubled quote inside a cell changes nothing: it closes and opens again.
            quoted = np.logical_xor.accumulate(np.concatenate([[is_quoted], codes == ord('"')]))[1:]
            ends.append(np.flatnonzero((codes == ord("\n")) & ~quoted) + offset)
            is_quoted = bool(quoted[-1])
            offset += len(chunk)
        stops = np.concatenate([*ends, [offset]]).astype(np.int64)
        starts = np.concatenate([[0], stops[:-1] + 1]).astype(np.int64)
        not_blank = stops > starts
        for i in np.flatnonzero(not_blank & (stops - starts <= 2)):
            file.seek(int(starts[i]))
            not_blank[i] = bool(file.read(int(stops[i] - starts[i])).strip())
    return np.stack([starts, stops], axis=1)[not_blank]
