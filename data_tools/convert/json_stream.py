"""Records from JSON files of any size: a JSON array or JSON lines, read piece by piece."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, TextIO

_CHUNK = 1 << 20
_SPACE = " \t\r\n"


def iter_json(path: Path) -> Iterator[tuple[Any, int]]:
    """Yield (value, bytes read so far) for each element of a top-level array, or else for each line.

    A line that is no JSON is yielded as its text, for the caller to count. In an array nothing after such a place can
    be trusted: raises ValueError with its character position. Bytes that are not UTF-8 come as lone surrogates, which
    `data_tools.convert.dropped.check_unicode` refuses. Memory: two chunks, or the longest value.
    """
    with path.open("rb") as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape") as file:
        head = file.read(1)
        while head and head in _SPACE:
            head = file.read(1)
        if head == "[":
            yield from _array(path, file, raw)
            return
        first = head + file.readline()
        for line in _lines(first, file):
            yield _value(line), raw.tell()


def _lines(first: str, file: TextIO) -> Iterator[str]:
    line = first
    while line:
        if line.strip():
            yield line
        line = file.readline()


def _value(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return line


def _array(path: Path, file: TextIO, raw: BinaryIO) -> Iterator[tuple[Any, int]]:
    """Elements of an array whose `[` has been read."""
    decoder = json.JSONDecoder()
    buffer, start, base, is_end = "", 0, 1, False
    while True:
        while start < len(buffer) and buffer[start] in _SPACE + ",":
            start += 1
        if start < len(buffer) and buffer[start] == "]":
            return
        if start < len(buffer):
            try:
                value, end = decoder.raw_decode(buffer, start)
            except (ValueError, RecursionError) as error:
                problem = str(error)
            else:
                # Only a delimiter ends a value: "-1" may go on as "-1.5" in the next chunk.
                tail = buffer[end : end + 64].lstrip(_SPACE)
                if tail[:1] in (",", "]"):
                    yield value, raw.tell()
                    start = end
                    continue
                problem = f"expected , or ] but found {tail[:10]!r}" if tail else ""
            if is_end:
                raise ValueError(f"{path}: no JSON value at character {base + start}: {problem or 'the file ends'}")
        elif is_end:
            raise ValueError(f"{path}: the file ends inside its array, at character {base + start}")
        # Grow by at least what is pending, so that one long value is scanned a logarithmic number of times.
        chunk = file.read(max(_CHUNK, len(buffer) - start))
        is_end = not chunk
        base, buffer, start = base + start, buffer[start:] + chunk, 0
