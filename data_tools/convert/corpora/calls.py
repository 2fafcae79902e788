"""Places in the pointer calls of an answer: their numbers are written anew, every word stays.

pyautogui.click(x=0.5, y=0.5), mobile.swipe(from_coord=[0.5, 0.7], to_coord=[0.5, 0.3]) and their kind, in the middle of
thoughts. Places between tags or under keys of JSON: data_tools/convert/marked_places.py.
"""

from __future__ import annotations

import math
import re

from data_tools.convert.dropped import DropError
from pixelprune.answers import POINTER_CALLS

__all__ = ["rewrite_calls"]

_NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?")
_NAMES = "|".join((*POINTER_CALLS, "scroll", "swipe", "long_press", "tap", "select_option"))
_OPENS = re.compile(rf"\b(?:pyautogui|mobile|browser|computer)\.({_NAMES})\(")
_CALL = re.compile(_OPENS.pattern + r"((?:[^()]|\([^()]*\))*)\)")
_QUOTED = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"")
_BY_NAME = re.compile(rf"\bx\s*=\s*({_NUMBER.pattern})\s*,\s*y\s*=\s*({_NUMBER.pattern})")
_LIST = re.compile(r"\b\w*coord\w*\s*=\s*[\[(]([^\[\]()]*)[\])]")
_FIRST_TWO = re.compile(rf"\s*({_NUMBER.pattern})\s*,\s*({_NUMBER.pattern})\s*(?=,|$)")

Span = tuple[int, int]


def rewrite_calls(text: str, image_size: tuple[int, int], system: str) -> tuple[str, list[list[float]]]:
    """(the text with the places of its calls relative 0-1000, the places as x, y in pixels).

    image_size: (width, height) pixels of the original image. system: absolute (pixels), relative (0-1000) or fraction
    (0-1), what the numbers mean now. Raises DropError for numbers that are no place in that system.
    """
    pieces, places, cut = [], list[list[float]](), 0
    calls = list(_CALL.finditer(text))
    if len(calls) < len(_OPENS.findall(text)):
        raise DropError("a call that is not understood")
    for spans in sorted(spans for call in calls for spans in _places_of_call(call)):
        numbers = [text[start:end] for start, end in spans]
        if len(numbers) != 2:
            raise DropError(f"{len(numbers)} numbers where a place was expected")
        _check_system(numbers, system)
        place = []
        for axis, ((start, end), number) in enumerate(zip(spans, numbers, strict=True)):
            side = image_size[axis % 2]
            share = float(number) / {"absolute": side, "relative": 1000, "fraction": 1}[system]
            if not 0 <= share <= 1:
                raise DropError("coordinates outside the image")
            pieces += [text[cut:start], str(math.floor(share * 1000 + 0.5))]
            cut = end
            place.append(round(share * side, 3))
        places.append(place)
    return "".join([*pieces, text[cut:]]), places


def _check_system(numbers: list[str], system: str) -> None:
    is_fraction = any("." in number for number in numbers) and all(abs(float(number)) <= 1 for number in numbers)
    if is_fraction and system != "fraction":
        raise DropError("fractions 0-1 where others were expected (see --coordinates)")
    if system == "fraction" and any(abs(float(number)) > 1 for number in numbers):
        raise DropError("no fractions 0-1 where they were expected (see --coordinates)")


def _places_of_call(match: re.Match[str]) -> list[list[Span]]:
    """Numbers outside quotes that stand as x= and y=, in a list of coordinates, or first among the arguments."""
    shift = match.start(2)
    arguments = _QUOTED.sub(lambda quoted: " " * len(quoted.group(0)), match.group(2))
    pairs = [*_BY_NAME.finditer(arguments)]
    if not pairs and match.group(1) != "scroll" and (first := _FIRST_TWO.match(arguments)):
        pairs = [first]  # the first argument of scroll is how far
    places = [[(pair.start(i) + shift, pair.end(i) + shift) for i in (1, 2)] for pair in pairs]
    lists = [[m.span() for m in _NUMBER.finditer(arguments, *found.span(1))] for found in _LIST.finditer(arguments)]
    num_others = len(_NUMBER.findall(arguments)) - (match.group(1) == "scroll")
    if not places and not lists and num_others > 0:
        raise DropError("a call that is not understood")
    return places + [[(start + shift, end + shift) for start, end in spans] for spans in lists]
