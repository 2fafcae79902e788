"""Records of a JSON file in place: the byte range of each is found once, and one is parsed when it is asked for.

JSON lines      one record a line; the suffix .json may hold them, too
an array        [{...}, ...]
one object      {"data": [{...}, ...]}, whose other keys may only describe
values          {...} {...}, each over several lines, as a pretty printer leaves them; a single record among them
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from pixelprune.records.keys import HARMLESS, is_empty
from pixelprune.records.record import RecordError, of_the_record
from training.data.files.byte_file import ByteFile

__all__ = ["MAX_RECORD_BYTES", "JsonRows", "check_size"]

MAX_RECORD_BYTES = 1 << 28
"""Most bytes of one record, or of one member of an archive: a damaged or hostile file costs one record, not the run."""
SCAN_BYTES = 1 << 26
_HEAD_BYTES = 1 << 20
_BLANK = b"\xef\xbb\xbf \t\r\n"
_DESCRIBES = HARMLESS["record"] | {"info", "metadata", "description"}


class JsonRows:
    """Records of one JSON file. Picklable.

    path: the file that is read. name: what the user knows it by, where it was unpacked from another.
    """

    def __init__(self, path: Path, name: str = ""):
        self.path = path
        self.name = name or str(path)
        self.spans = _spans(path, self.name)
        self._bytes = ByteFile(path, self.name)

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, row: int) -> Any:
        """The parsed record. Raises RecordError (invalid_json, record_too_large); UserError as `ByteFile.read`."""
        start, end = map(int, self.spans[row])
        check_size(end - start)
        data = self._bytes.read(start, end)
        with of_the_record():
            try:
                return json.loads(data)
            except (ValueError, RecursionError) as error:
                raise RecordError("invalid_json", f"not valid JSON: {error}") from error

    def where(self, row: int) -> str:
        return f"{self.name}, record {row + 1}"


def check_size(num_bytes: int, what: str = "the record") -> None:
    """Raises RecordError with reason record_too_large."""
    if num_bytes > MAX_RECORD_BYTES:
        raise RecordError(
            "record_too_large", f"{what} has more than {MAX_RECORD_BYTES >> 20} MiB; keep images in files beside it"
        )


def _spans(path: Path, name: str) -> np.ndarray:
    """Byte ranges int64 (n, 2) of the records. Raises ValueError for a damaged array or object."""
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES).lstrip(_BLANK)
    first_line, _, rest = head.partition(b"\n")
    if path.suffix.lower() != ".json":
        # Lines by their name; one that holds a bracket alone is no record in any format.
        return _value_spans(path, name) if first_line.strip() in (b"{", b"[") else _line_spans(path)
    if head.startswith(b"["):
        return _value_spans(path, name)
    if not head.startswith(b"{"):
        return _line_spans(path)
    first = _parsed(first_line)
    if first is None:
        # An object over several lines; or a damaged line, which an object alone on the next one tells.
        return _line_spans(path) if _parsed(rest.lstrip().partition(b"\n")[0]) else _value_spans(path, name)
    return _value_spans(path, name) if not rest.strip() and "data" in first else _line_spans(path)


def _parsed(line: bytes) -> dict[str, Any] | None:
    """The object that a line is, None for what is none."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _line_spans(path: Path) -> np.ndarray:
    """Byte ranges int64 (n, 2) of the lines that are not blank."""
    ends = []
    with path.open("rb") as file:
        offset = 0
        while chunk := file.read(SCAN_BYTES):
            ends.append(np.flatnonzero(np.frombuffer(chunk, dtype=np.uint8) == 10) + offset)
            offset += len(chunk)
        ends.append(np.array([offset], dtype=np.int64))
        stops = np.concatenate(ends)
        starts = np.concatenate([[0], stops[:-1] + 1])
        # Only a line too short to hold a record can be blank; longer ones are parsed and judged later.
        long_enough = stops - starts > 2
        for i in np.flatnonzero(~long_enough & (stops > starts)):
            file.seek(starts[i])
            long_enough[i] = bool(file.read(stops[i] - starts[i]).strip())
    return np.stack([starts, stops], axis=1)[long_enough]


_SPACE = re.compile(r"\s*")


def _value_spans(path: Path, name: str) -> np.ndarray:
    """Byte ranges int64 (n, 2) of the elements of an array, of an object's `data`, or of values one after another."""
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"source {name}: not UTF-8 text ({error}) (sources[].path)") from error
    spans: list[tuple[int, int]] = []
    at_start = _SPACE.match(text).end()  # type: ignore[union-attr]
    try:
        if text.startswith("[", at_start):
            _add_elements(text, at_start, spans)
        else:
            start = _data_of_the_object(text, at_start, name)
            if start is not None:
                _add_elements(text, start, spans)
            else:
                _add_values(text, at_start, spans)
    except (json.JSONDecodeError, IndexError, RecursionError) as error:
        what = "array" if text.startswith("[", at_start) else "text"
        raise ValueError(
            f"source {name}: the JSON {what} is damaged after {len(spans)} records ({error}); "
            "one record per line (.jsonl) would lose only the damaged one"
        ) from error
    return _in_bytes(text, spans, 3 if data.startswith(b"\xef\xbb\xbf") else 0)


def _add_elements(text: str, bracket: int, spans: list[tuple[int, int]]) -> int:
    """Append the ranges of the elements of the array that opens at `bracket`; returns the place behind it."""
    decode = json.JSONDecoder().raw_decode
    place = _SPACE.match(text, bracket + 1).end()  # type: ignore[union-attr]
    while text[place] != "]":
        _, end = decode(text, place)
        spans.append((place, end))
        place = _SPACE.match(text, end).end()  # type: ignore[union-attr]
        if text[place] == ",":
            place = _SPACE.match(text, place + 1).end()  # type: ignore[union-attr]
        elif text[place] != "]":
            raise json.JSONDecodeError("expected ',' or ']'", text, place)
    return place + 1


def _add_values(text: str, place: int, spans: list[tuple[int, int]]) -> None:
    decode = json.JSONDecoder().raw_decode
    while place < len(text):
        _, end = decode(text, place)
        spans.append((place, end))
        place = _SPACE.match(text, end).end()  # type: ignore[union-attr]


def _data_of_the_object(text: str, place: int, name: str) -> int | None:
    """Where the array `data` opens, if the whole text is one object around it; None if it is none.

    Raises ValueError when keys beside `data` may mean something.
    """
    decode, others, found = json.JSONDecoder().raw_decode, [], None
    whole, end = decode(text, place)
    if not isinstance(whole, dict) or not isinstance(whole.get("data"), list) or text[end:].strip():
        return None
    del whole
    place = _SPACE.match(text, place + 1).end()  # type: ignore[union-attr]
    while text[place] != "}":
        key, end = decode(text, place)
        place = _SPACE.match(text, text.index(":", end) + 1).end()  # type: ignore[union-attr]
        value, end = decode(text, place)
        if key == "data":
            found = place
        elif key not in _DESCRIBES and not is_empty(value):
            others.append(key)
        place = _SPACE.match(text, end).end()  # type: ignore[union-attr]
        if text[place] == ",":
            place = _SPACE.match(text, place + 1).end()  # type: ignore[union-attr]
    if others:
        raise ValueError(
            f"source {name}: an object with 'data' and {', '.join(map(repr, others))}, which would not be read; keep "
            "the records alone, as a JSON array or one a line (sources[].path)"
        )
    return found


def _in_bytes(text: str, spans: list[tuple[int, int]], at_byte: int) -> np.ndarray:
    """Ranges of characters as ranges of bytes."""
    at, ranges = 0, []
    for start, end in spans:
        start_byte = at_byte + len(text[at:start].encode())
        at, at_byte = end, start_byte + len(text[start:end].encode())
        ranges.append((start_byte, at_byte))
    return np.array(ranges, dtype=np.int64).reshape(-1, 2)
