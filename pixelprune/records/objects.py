"""Things and places that a record names beside its turns -> text at their marks, written in one way.

ms-swift 4.6.0, its grounding records (normalize_bbox of its template, _check_objects of its preprocessor):

    {"messages": [{"role": "user", "content": "<image>Find <ref-object>."}, {"role": "assistant", "content": "<bbox>"}],
     "images": ["a.png"], "objects": {"ref": ["the menu"], "bbox": [[10, 20, 30, 40]], "bbox_type": "real"}}

Marks take their things in order, over all turns but a tool's. As there, corners may be in either order and `image_id`
says which image a place lies in, the first one by default; unlike there, marks and things that do not match in number
are refused, and so are places outside the image.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pixelprune.answers import RELATIVE, format_place, format_words
from pixelprune.records.agents import strings_in
from pixelprune.records.keys import KeyRules, is_empty
from pixelprune.records.record import ImageRef, Message, ObjectMark, Part, Record, RecordError

__all__ = ["PLAIN_STYLE", "UNITS", "ObjectStyle", "with_objects", "written"]

UNITS = {"real": 0, "pixel": 0, "norm1": 1, "norm1000": RELATIVE}
"""What `bbox_type` says of the numbers: pixels of the original image (0), or shares of its sides out of this."""

_KEYS = ("ref", "bbox", "bbox_type", "image_id")
_TARGETS = ("bbox", "bboxes", "polygon", "refusal", "scorer", "point")
"""Keys of metadata that say what a right answer is."""
_MARK = re.compile(r"<(ref-object|bbox)>")


@dataclass(frozen=True)
class ObjectStyle:
    """How places are written. format: one of `pixelprune.answers.FORMATS`; `auto` writes boxes as boxes and points as
    points, relative 0-1000. tokens: between the model's own tokens for boxes and for things."""

    format: str = "auto"
    tokens: bool = False


PLAIN_STYLE = ObjectStyle()


def with_objects(messages: list[Message], value: Any, rules: KeyRules) -> list[Message]:
    """The messages with an `ObjectMark` at every mark of their text. value: the record's `objects`, or its JSON text.

    Raises RecordError with reason bad_objects, object_count or unread_key.
    """
    if is_empty(value):
        return messages
    num_images = sum(isinstance(part, ImageRef) for message in messages for part in message.parts)
    words, places = _things(value, num_images, rules)
    if not words and not places:
        return messages
    supply = {"ref-object": list(words), "bbox": list(places)}
    num_marks = dict.fromkeys(supply, 0)

    def marked(part: Part) -> list[Part]:
        if not isinstance(part, str):
            return [part]
        pieces: list[Part] = []
        for number, piece in enumerate(_MARK.split(part)):
            if number % 2 == 0:
                pieces += [piece] if piece else []
                continue
            place = num_marks[piece]
            num_marks[piece] += 1  # counted on beyond the things there are, for the message
            pieces += supply[piece][place : place + 1]
        return pieces

    done = []
    for message in messages:
        if any(_MARK.search(text) for text in (message.reasoning, *strings_in(message.tool_calls))):
            raise RecordError("bad_objects", "a mark of `objects` stands in reasoning or a call, where none is read")
        parts = [p for part in message.parts for p in (marked(part) if message.role != "tool" else [part])]
        done.append(replace(message, parts=tuple(parts)))
    for mark, things in supply.items():
        if num_marks[mark] != len(things):
            key = "ref" if mark == "ref-object" else "bbox"
            raise RecordError("object_count", f"{num_marks[mark]} <{mark}> in the text, {len(things)} in objects.{key}")
    return done


def _things(value: Any, num_images: int, rules: KeyRules) -> tuple[list[ObjectMark], list[ObjectMark]]:
    """The words and the places of `objects`, checked as far as no image is needed."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise RecordError("bad_objects", f"objects: not valid JSON: {error}") from error
    if not isinstance(value, Mapping):
        raise RecordError("bad_objects", f"objects is {type(value).__name__}, expected an object with ref and bbox")
    value = rules.checked(value, "object", _KEYS)
    words, boxes, images = (value.get(key, []) for key in ("ref", "bbox", "image_id"))
    unit = value.get("bbox_type", "real")
    if not isinstance(unit, str) or unit not in UNITS:
        raise RecordError("bad_objects", f"objects.bbox_type is {unit!r:.40}, expected one of {', '.join(UNITS)}")
    for key, listed in (("ref", words), ("bbox", boxes), ("image_id", images)):
        if not isinstance(listed, list | tuple):
            raise RecordError("bad_objects", f"objects.{key} is {type(listed).__name__}, expected a list")
    if not all(isinstance(word, str) and word for word in words):
        raise RecordError("bad_objects", f"objects.ref holds {words!r:.80}, expected texts")
    if len(images) > len(boxes) or not all(type(i) is int and 0 <= i < num_images for i in images):
        raise RecordError(
            "bad_objects", f"objects.image_id is {images!r:.80}, expected for each box the number of an image from 0 on"
        )
    if boxes and not num_images:
        raise RecordError("bad_objects", "objects.bbox: the record has no image")
    images = [*images, *[0] * (len(boxes) - len(images))]
    places = [ObjectMark(place=_corners(b), unit=unit, image=i) for b, i in zip(boxes, images, strict=True)]
    return [ObjectMark(words=word) for word in words], places


def _corners(box: Any) -> tuple[float, ...]:
    is_place = isinstance(box, list | tuple) and len(box) in (2, 4)
    if not is_place or not all(type(n) in (int, float) and math.isfinite(n) for n in box):
        raise RecordError("bad_objects", f"objects.bbox holds {box!r:.80}, expected two or four finite numbers")
    return tuple(box) if len(box) == 2 else tuple(f(box[i], box[i + 2]) for f in (min, max) for i in (0, 1))


def written(record: Record, size_of: Callable[[ImageRef], tuple[int, int, int]], style: ObjectStyle) -> Record:
    """The record with its marks as text, and in its metadata the box that its last answer gives, if it gives one alone.

    The box is what evaluation compares an answer with, unless the metadata says otherwise.
    size_of: (width, height) of an image when upright, and its EXIF orientation (1-8); asked where a place needs it.
    Raises RecordError with reason bad_objects, place_outside or turned_image, and what `size_of` raises.
    """
    if not any(isinstance(part, ObjectMark) for message in record.messages for part in message.parts):
        return record
    images = record.images
    sizes: dict[int, tuple[int, int]] = {}

    def size(number: int) -> tuple[int, int]:
        if number not in sizes:
            width, height, orientation = size_of(images[number])
            if orientation != 1:
                raise RecordError("turned_image", "an image is turned by EXIF: objects.bbox could mean either frame")
            sizes[number] = width, height
        return sizes[number]

    def text_of(part: Part, role: str) -> Part:
        if not isinstance(part, ObjectMark):
            return part
        if not part.place:
            return format_words(part.words, tokens=style.tokens)
        return _place_text(part, size(part.image), style, is_answer=role == "assistant")

    messages = [replace(m, parts=_joined([text_of(part, m.role) for part in m.parts])) for m in record.messages]
    return replace(record, messages=tuple(messages), metadata=_target(record, size) | record.metadata)


def _target(record: Record, size: Callable[[int], tuple[int, int]]) -> dict[str, Any]:
    """`bbox`, pixels of the last image, where that is what the last answer names and nothing else is asked for."""
    if record.messages[-1].role != "assistant" or any(key in record.metadata for key in _TARGETS):
        return {}
    places = [part for part in record.messages[-1].parts if isinstance(part, ObjectMark) and part.place]
    if len(places) != 1 or len(places[0].place) != 4 or places[0].image != len(record.images) - 1:
        return {}
    return {"bbox": _pixels(places[0], size(places[0].image))}


def _pixels(mark: ObjectMark, image_size: tuple[int, int]) -> list[float]:
    unit = UNITS[mark.unit]
    return [n * image_size[i % 2] / unit if unit else n for i, n in enumerate(mark.place)]


def _place_text(mark: ObjectMark, image_size: tuple[int, int], style: ObjectStyle, *, is_answer: bool) -> str:
    unit = UNITS[mark.unit]
    limits = [unit, unit] if unit else image_size
    if not all(0 <= n <= limits[i % 2] for i, n in enumerate(mark.place)):
        raise RecordError(
            "place_outside",
            f"objects.bbox {list(mark.place)} ({mark.unit}) lies outside the image of "
            f"{image_size[0]}x{image_size[1]} pixels; say in bbox_type what the numbers are ({', '.join(UNITS)})",
        )
    try:
        place = _pixels(mark, image_size)
        return format_place(place, image_size, format=style.format, tokens=style.tokens, is_answer=is_answer)
    except ValueError as error:
        raise RecordError("bad_objects", f"objects.bbox: {error}") from error


def _joined(parts: Sequence[Part]) -> tuple[Part, ...]:
    """Neighbouring texts as one: the turn as if it had been written so."""
    joined: list[Part] = []
    for part in parts:
        if isinstance(part, str) and joined and isinstance(joined[-1], str):
            joined[-1] += part
        else:
            joined.append(part)
    return tuple(joined)
