"""Places that a text marks as such, among other words: each is written anew where it stands, the words stay.

Read are <point>, <box> and <bbox> with their numbers or lists of numbers, <|box_start|>(x, y), ...<|box_end|>, and JSON
objects with `point_2d`, `bbox_2d`, `quad_2d` and their kind, labels and all, as OS-Atlas, Qwen-VL and their descendants
write them. Bare numbers are no places: nothing says that they are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from data_tools.convert.coordinates import NONE, SEVERAL, read_place, write_place
from data_tools.convert.dropped import DropError
from pixelprune.answers import Answer, Point, centre_of

__all__ = ["rewrite_marked", "rewrite_places"]

_TAG = re.compile(r"<(point|box|bbox)>([^<>]{1,4000})</\1>|<\|(box)_start\|>([^<>]{1,4000})<\|box_end\|>")
_NUMBER = re.compile(r"[-+]?\d{1,7}(?:\.\d{1,17})?")
_BETWEEN = re.compile(r"[\s,;()\[\]]*")
_POINT_KEYS = ("point_2d", "point", "coordinate", "position")
_BOX_KEYS = ("bbox_2d", "bbox", "box")
_CORNER_KEYS = ("quad_2d", "points", "polygon")
"""Corners of one thing: the place is the centre."""
_JSON_STARTS = re.compile(r"[\[{]")
_MOST_VALUES = 256

Numbers = list[float]


def rewrite_places(text: str, image_size: tuple[int, int], system: str, form: str) -> tuple[str, list[Answer]]:
    """(the answer with its places relative 0-1000, the places in pixels): one that is all of it, or marked among words.

    image_size, system: as for `read_place`; form: as for `write_place`. Raises DropError with the reason.
    """
    try:
        answer = read_place(text, image_size, system)
    except DropError as error:
        if str(error) not in (NONE, SEVERAL):
            raise
        made, places = rewrite_marked(text, image_size, system, form)
        if not places:
            raise
        return made, places
    return write_place(answer, image_size, form), [answer]


def rewrite_marked(text: str, image_size: tuple[int, int], system: str, form: str) -> tuple[str, list[Answer]]:
    """(the text with its places relative 0-1000, the places in pixels); the text as it is where none is marked.

    image_size, system: as for `read_place`; form: as for `write_place`; JSON stays JSON, whatever the form.
    Raises DropError for a place that cannot be read, and for a tool call among words.
    """
    places: list[Answer] = []

    def read(numbers: Numbers) -> Answer:
        answer = read_place(json.dumps(numbers), image_size, system)
        places.append(answer)
        return answer

    def write(match: re.Match[str]) -> str:
        if not _NUMBER.search(match.group(2) or match.group(4)):
            return match.group(0)  # a prompt that explains the form, with words where numbers belong
        is_point = (match.group(1) or match.group(3)) == "point"
        if form == "tool_call":
            raise DropError("words or several places, which a tool call leaves no room for")
        found = _places_in(match.group(2) or match.group(4), is_point)
        return ", ".join(write_place(read(numbers), image_size, form) for numbers in found)

    pieces, cut = [], 0
    for start, end, value in _json_values(text):
        rewritten = json.dumps(_rewritten(value, read, image_size), ensure_ascii=False)
        pieces += [_TAG.sub(write, text[cut:start]), rewritten]
        cut = end
    return "".join(pieces) + _TAG.sub(write, text[cut:]), places


def _places_in(body: str, is_point: bool) -> list[Numbers]:
    """The places between two tags, each as two or four numbers."""
    try:
        value = json.loads(body)
    except ValueError:
        value = [_as_number(n) for n in _NUMBER.findall(body)]
        if not all(_BETWEEN.fullmatch(rest) for rest in _NUMBER.split(body)):
            raise DropError("coordinates not understood") from None
    if not _is_list_of_numbers(value):
        if not isinstance(value, list) or not value or not all(map(_is_list_of_numbers, value)):
            raise DropError("coordinates not understood")
        pairs = [n for pair in value for n in pair]
        one_thing = all(len(inner) == 2 for inner in value) and not is_point
        return [_place(pairs)] if one_thing else [_place(inner) for inner in value]
    return [_place(value)]


def _place(numbers: Numbers) -> Numbers:
    if len(numbers) in (2, 4):
        return numbers
    if len(numbers) < 6 or len(numbers) % 2:
        raise DropError("coordinates not understood")
    return list(_centre(numbers))


def _centre(numbers: Numbers) -> Point:
    return centre_of(list(zip(numbers[::2], numbers[1::2], strict=True)))


def _json_values(text: str) -> Iterator[tuple[int, int, Any]]:
    """(start, end, value) of the JSON in the text that holds a place under one of the known keys."""
    decoder, position = json.JSONDecoder(), 0
    for _ in range(_MOST_VALUES):
        match = _JSON_STARTS.search(text, position)
        if match is None:
            return
        try:
            value, end = decoder.raw_decode(text, match.start())
        except (ValueError, RecursionError):
            position = match.start() + 1
            continue
        if any(_keys_of(value)):
            yield match.start(), end, value
        position = end


def _keys_of(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield from (key for key in value if key in (*_POINT_KEYS, *_BOX_KEYS, *_CORNER_KEYS))
        value = list(value.values())
    for inner in value if isinstance(value, list) else []:
        yield from _keys_of(inner)


def _rewritten(value: Any, read: Any, image_size: tuple[int, int]) -> Any:
    """The JSON value with its places relative; corners become the point in their midst."""
    if isinstance(value, list):
        return [_rewritten(inner, read, image_size) for inner in value]
    if not isinstance(value, dict):
        return value
    made: dict[str, Any] = {}
    for key, inner in value.items():
        is_word = isinstance(inner, str) and not any(letter.isdigit() for letter in inner)
        if is_word or key not in (*_POINT_KEYS, *_BOX_KEYS, *_CORNER_KEYS):
            made[key] = _rewritten(inner, read, image_size)
            continue
        numbers = inner
        if isinstance(inner, list) and inner and all(map(_is_list_of_numbers, inner)):
            numbers = [n for pair in inner for n in pair]
        if not _is_list_of_numbers(numbers):
            raise DropError("coordinates not understood")
        if key in _CORNER_KEYS and len(numbers) < 6:
            raise DropError("coordinates not understood")
        answer = read(_place(numbers))
        form = "box" if answer.box is not None else "point"
        written = write_place(answer, image_size, form)
        made["point_2d" if key in _CORNER_KEYS else key] = [int(n) for n in _NUMBER.findall(written)]
    return made


def _is_list_of_numbers(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(n) in (int, float) for n in value)


def _as_number(text: str) -> float:
    return float(text) if "." in text else int(text)
