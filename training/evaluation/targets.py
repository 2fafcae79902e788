"""What the answer of a record is compared with, read from its metadata: a place, references, an option."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from pixelprune.answers import Box, Point
from pixelprune.records.record import Record

SCORERS = ("place", "anls", "relaxed", "exact", "contains", "contains_formula", "option", "predictions")
"""Names that `metadata.scorer` may have; `training.evaluation.scorers` holds what they mean."""


class TargetError(ValueError):
    """A record that cannot be evaluated: the message says what is missing."""


@dataclass(frozen=True)
class Target:
    """What the answer of a record is compared with, and the groups it counts in.

    scorer: one of SCORERS. references: right answers, of which one is enough; for options their letters.
    box: x1, y1, x2, y2 in pixels of the original image; polygon: its corners; is_refusal: the right answer is that
    there is no such place. image_size: (width, height), None when the record does not say: it is then the image's.
    benchmark, subset, element: names to group by ("" where the record has none). all_of: records of one benchmark with
    the same name here are one question asked several times, right when all answers are ("" for a question of its own).
    source_id: the record's own id, as its benchmark publishes it.
    """

    scorer: str
    references: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    box: Box | None = None
    polygon: tuple[Point, ...] = ()
    is_refusal: bool = False
    image_size: tuple[int, int] | None = None
    benchmark: str = ""
    subset: str = ""
    element: str = ""
    all_of: str = ""
    source_id: str = ""


def target_of(record: Record) -> Target:
    """Read `metadata`: `scorer` (place where it is left out), `answers`, `options`, `bbox`, `polygon`, `refusal`,
    `image_size`, `source`, `subset` (else `source`), `element`, `all_of` and the record's `id`.

    Raises TargetError when what the scorer needs is not there, or cannot be compared with.
    """
    metadata = record.metadata
    scorer = metadata.get("scorer") or "place"
    if scorer not in SCORERS:
        raise TargetError(f"metadata.scorer: expected one of {', '.join(SCORERS)}, got {scorer!r:.40}")
    source = str(metadata.get("source") or "")
    groups: dict[str, Any] = {
        "benchmark": source,
        "subset": str(metadata.get("subset") or source),
        "element": str(metadata.get("element") or ""),
        "all_of": str(metadata.get("all_of") or ""),
        "source_id": str(metadata.get("id") or ""),
        "image_size": _image_size(metadata.get("image_size")),
    }
    if scorer == "place":
        return Target(scorer, **_place(metadata), **groups)
    if scorer == "predictions":
        return Target(scorer, **groups)
    references = _texts(metadata, "answers")
    options: tuple[str, ...] = ()
    if scorer == "option":
        options = _texts(metadata, "options")
        letters = [chr(ord("A") + number) for number in range(len(options))]
        if len(options) > 26 or any(reference.strip().upper() not in letters for reference in references):
            raise TargetError(f"metadata.answers {list(references)}: expected letters of {len(options)} options")
    return Target(scorer, references, options, **groups)


def _texts(metadata: dict[str, Any], key: str) -> tuple[str, ...]:
    value = metadata.get(key)
    if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
        raise TargetError(f"metadata.{key} {value!r:.80}: scorer {metadata['scorer']!r} expects a list of texts")
    return tuple(value)


def _place(metadata: dict[str, Any]) -> dict[str, Any]:
    """Exactly one of box, polygon and refusal."""
    given = [key for key in ("bbox", "polygon", "refusal") if metadata.get(key) not in (None, False)]
    if not given:
        raise TargetError("no metadata.bbox, polygon, refusal or scorer: nothing to compare an answer with")
    if len(given) > 1:
        raise TargetError(f"metadata has {' and '.join(given)}: expected one place")
    value = metadata[given[0]]
    if given[0] == "refusal":
        if value is not True:
            raise TargetError(f"metadata.refusal {value!r:.40}: expected true or false")
        return {"is_refusal": True}
    return {"polygon": _polygon(value)} if given[0] == "polygon" else {"box": _box(value)}


def _box(box: Any) -> Box:
    if isinstance(box[0], list | tuple):
        raise TargetError(f"metadata.bbox holds {len(box)} boxes: expected four numbers, one box to be clicked")
    x1, y1, x2, y2 = box
    if not (x1 < x2 and y1 < y2):
        raise TargetError(f"metadata.bbox {list(box)}: expected x1 < x2 and y1 < y2, in pixels")
    if max(x2, y2) <= 1:
        raise TargetError(f"metadata.bbox {list(box)} looks like fractions of the image: expected pixels")
    return (x1, y1, x2, y2)


def _polygon(value: Any) -> tuple[Point, ...]:
    def is_corner(corner: Any) -> bool:
        return isinstance(corner, list | tuple) and len(corner) == 2 and all(map(_is_finite, corner))

    if not (isinstance(value, list | tuple) and len(value) >= 3 and all(map(is_corner, value))):
        raise TargetError(f"metadata.polygon {value!r:.80}: expected three or more corners [x, y], in pixels")
    if max(side for corner in value for side in corner) <= 1:
        raise TargetError(f"metadata.polygon {value!r:.80} looks like fractions of the image: expected pixels")
    return tuple((float(x), float(y)) for x, y in value)


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _image_size(value: Any) -> tuple[int, int] | None:
    if value is None:
        return None

    def is_side(side: Any) -> bool:
        return (type(side) is int or (type(side) is float and side.is_integer())) and side > 0

    if not (isinstance(value, list | tuple) and len(value) == 2 and all(map(is_side, value))):
        raise TargetError(f"metadata.image_size {value!r:.80}: expected [width, height], two positive whole numbers")
    return int(value[0]), int(value[1])
