"""What the readers of published benchmarks share: entries in, evaluation records out, everything left out counted."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_tools.convert.benchmarks.hub_tables import SUFFIX, hub_entries
from data_tools.convert.dropped import DropError, check_unicode
from data_tools.convert.image_files import ImageFiles
from data_tools.convert.json_stream import iter_json

MAX_SIDE = 1e9
"""Pixels; what is larger, or NaN, is no coordinate."""


class BenchmarkReader:
    """Entries -> evaluation records; `dropped` counts what was left out and why. Subclasses write `make`."""

    def __init__(self, images: ImageFiles) -> None:
        self.images = images
        self.dropped: Counter[str] = Counter()
        self.num_read = 0

    hub_names: Mapping[str, str] = {}
    """Column of the hub's Parquet -> field of the published files, where they differ; "image" is the picture."""

    def entries(self, path: Path) -> Iterator[tuple[Any, int]]:
        """(entry, bytes of the file read so far) of a JSON array, JSON lines, or the hub's Parquet."""
        if path.suffix.lower() == SUFFIX:
            yield from hub_entries(path, self.images, self.hub_names)
        else:
            yield from iter_json(path)

    def record(self, entry: Any, file: Path, number: int) -> dict[str, Any] | None:
        """One evaluation record, or None where it was dropped (and counted). number: the entry's place in its file."""
        self.num_read += 1
        try:
            if not isinstance(entry, dict):
                raise DropError("not a JSON object")
            if isinstance(entry.get("error"), DropError):
                raise entry["error"]
            record = self.make(entry, file, number)
            check_unicode([json.dumps(record, ensure_ascii=False)])
        except DropError as error:
            self.dropped[str(error)] += 1
            return None
        return record

    def make(self, entry: dict[str, Any], file: Path, number: int) -> dict[str, Any]:
        """The record of one entry. Raises DropError with the reason it is counted under."""
        raise NotImplementedError


def text_of(entry: dict[str, Any], key: str) -> str:
    """A text with something in it, outer spaces taken off. Raises DropError for anything else."""
    value = entry.get(key)
    if not isinstance(value, str) or not value.strip():
        raise DropError(f"{key} is no text")
    return value.strip()


def texts_of(entry: dict[str, Any], key: str) -> list[str]:
    """A list of texts as it is, a text as a list of one. Raises DropError for anything else, an empty list included."""
    value = entry.get(key)
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise DropError(f"{key}: no texts")
    return texts


def numbers_of(value: Any, what: str, count: int | None = None) -> list[float]:
    """Finite numbers of pixels, `count` of them where it is given. Raises DropError for other things, and for numbers
    that all lie within 0 and 1: fractions of the image, whose place in pixels nobody has stated."""
    is_list = isinstance(value, list | tuple) and len(value) > 0 and count in (None, len(value))
    if not is_list or not all(type(side) in (int, float) and abs(side) <= MAX_SIDE for side in value):
        raise DropError(f"{what} is not {count or 'a list of'} numbers of pixels")
    numbers = [float(side) for side in value]
    if all(0 <= side <= 1 for side in numbers):
        raise DropError(f"{what} is fractions of the image, expected pixels")
    return numbers


def box_in_image(x1: float, y1: float, x2: float, y2: float, size: tuple[int, int]) -> list[float]:
    """The box (pixels) as a list. Raises DropError when it is empty or misses the image of size (width, height)."""
    if x2 <= x1 or y2 <= y1:
        raise DropError("empty box")
    if x1 >= size[0] or y1 >= size[1] or x2 <= 0 or y2 <= 0:
        raise DropError("box outside the image")
    return [x1, y1, x2, y2]


def check_stated_size(stated: Any, size: tuple[int, int]) -> None:
    """Raises DropError when a benchmark states another (width, height) than its image file has."""
    if stated is not None and (not isinstance(stated, Sequence) or list(stated) != list(size)):
        raise DropError("the stated image size is not the file's")


def centre_of(points: Sequence[tuple[float, float]], size: tuple[int, int]) -> tuple[float, float]:
    """The middle of what encloses the points, moved into the image."""
    middles = [(min(values) + max(values)) / 2 for values in zip(*points, strict=True)]
    x, y = (min(max(middle, 0.0), float(side)) for middle, side in zip(middles, size, strict=True))
    assert math.isfinite(x + y)
    return x, y
