"""Examples of TFRecord files without TensorFlow: length-framed protobuf messages of type tf.train.Example.

The frame and the messages are published (github.com/tensorflow/tensorflow, tensorflow/core/lib/io/record_writer.h,
tensorflow/core/example/example.proto and feature.proto): a length (uint64), its checksum (uint32), the message, its
checksum; a map from names to lists of bytes, floats or integers. Checksums are not looked at: the files read here are
compressed by gzip, which has its own. Lists of floats are not read.
"""

from __future__ import annotations

import gzip
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MAX_EXAMPLE_BYTES = 1 << 30
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def iter_examples(path: Path) -> Iterator[tuple[dict[str, list[Any]], int]]:
    """(features by name, as lists of bytes or integers; bytes of the file read so far) of a file compressed by gzip.

    Raises ValueError for a file that is none, or damaged.
    """
    try:
        with path.open("rb") as raw, gzip.open(raw) as file:
            while head := file.read(12):
                length = struct.unpack("<Q", head[:8])[0] if len(head) == 12 else -1
                if not 0 <= length <= MAX_EXAMPLE_BYTES:
                    raise ValueError("no length of an example where one was expected")
                message = file.read(length)
                if len(message) != length or len(file.read(4)) != 4:
                    raise EOFError("the file ends inside an example")
                yield _features(message), raw.tell()
    except (OSError, EOFError, zlib.error, ValueError, IndexError, struct.error) as error:
        raise ValueError(f"{path}: damaged, or no TFRecord file compressed by gzip: {error}") from error


def _features(example: bytes) -> dict[str, list[Any]]:
    features: dict[str, list[Any]] = {}
    for number, value in _fields(example):
        for entry in (inner for inner_number, inner in _fields(value) if inner_number == 1) if number == 1 else ():
            name, feature = b"", b""
            for key, part in _fields(entry):
                name, feature = (part, feature) if key == 1 else (name, part) if key == 2 else (name, feature)
            features[bytes(name).decode()] = list(_values(feature))
    return features


def _values(feature: bytes) -> Iterator[Any]:
    for kind, values in _fields(feature):
        for number, value in _fields(values):
            if number != 1:
                continue
            if kind == 1:
                yield bytes(value)
            elif kind == 3 and isinstance(value, int):
                yield _signed(value)
            elif kind == 3:
                place = 0
                while place < len(value):
                    integer, place = _varint(value, place)
                    yield _signed(integer)


def _fields(message: Any) -> Iterator[tuple[int, Any]]:
    """(number, value) of a message's fields: integers, or memoryviews of bytes."""
    view, place = memoryview(message), 0
    while place < len(view):
        tag, place = _varint(view, place)
        kind = tag & 7
        if kind == _VARINT:
            value, place = _varint(view, place)
            yield tag >> 3, value
            continue
        if kind == _BYTES:
            size, place = _varint(view, place)
        elif kind in (_FIXED64, _FIXED32):
            size = 8 if kind == _FIXED64 else 4
        else:
            raise ValueError(f"a protobuf field of kind {kind}")
        if place + size > len(view):
            raise ValueError("a protobuf field longer than its message")
        yield tag >> 3, view[place : place + size]
        place += size


def _varint(data: Any, place: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if not byte & 0x80:
            return value, place
    raise ValueError("a protobuf integer longer than 64 bits")


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
