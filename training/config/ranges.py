"""What one field of the settings may hold, said beside the field: `check_fields(self, lr=POSITIVE)`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

AUTO = -1
"""Value of model.recompute_vit and model.recompute_llm: chosen from the memory estimate."""


class Range(NamedTuple):
    """expected: in words, behind "expected"; holds: whether a value lies in it."""

    expected: str
    holds: Callable[[Any], bool]


def at_least(lowest: float, note: str = "") -> Range:
    return Range(f"at least {lowest}{note}", lambda value: lowest <= value < math.inf)


POSITIVE = Range("a number > 0", lambda value: 0 < value < math.inf)
SHARE = Range("a number from 0 to 1", lambda value: 0 <= value <= 1)
BELOW_1 = Range("a number >= 0 and < 1", lambda value: 0 <= value < 1)
EVERY_K = Range(
    f"{AUTO} (chosen at the start), 0 (no layer), 1 (every layer) or k (every k-th)", lambda value: value >= AUTO
)
FOLDER_NAME = Range(
    "a folder name of at most 200 bytes",  # file systems take 255; the longest name made of it adds 20
    lambda value: value not in ("", ".", "..") and not set(value) & {"/", "\0"} and len(value.encode()) <= 200,
)


_ranges: dict[type, dict[str, Range]] = {}


def ranges_of(kind: type) -> dict[str, Range]:
    """Field -> what it is held to; known once an object of this kind was made."""
    return _ranges.get(kind, {})


def check_fields(settings: Any, **ranges: Range) -> None:
    """Raises ValueError "field: expected ..., got ..." for the first field out of its range.

    None, where a field's type allows it, is always allowed. Fields of a Literal type need no range: the recipe's reader
    holds them to it.
    """
    _ranges[type(settings)] = ranges
    for name, allowed in ranges.items():
        value = getattr(settings, name)
        if value is not None and not allowed.holds(value):
            raise ValueError(f"{name}: expected {allowed.expected}, got {value!r}")
