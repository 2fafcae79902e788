"""Coordinates inside answers: which answers give a place, and how it is written anew, relative to the image."""

from __future__ import annotations

import re

from data_tools.convert.dropped import DropError
from pixelprune.answers import POINTER_CALLS, Answer, format_box, format_point, parse_answer

SYSTEMS = ("absolute", "relative", "fraction")
NONE, SEVERAL = "no coordinates", "several coordinates in one answer"
"""Why a text is not one place."""
ANSWERS = ("auto", "point", "box", "tool_call")
_CALL = re.compile(r"pyautogui\.(\w+)\(([^()]*)\)")
_TOOL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
_NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?")
_FIRST_TWO = re.compile(rf"\s*({_NUMBER.pattern})\s*,\s*(?:y\s*=\s*)?({_NUMBER.pattern})\s*(?:,|$)")
_BY_NAME = re.compile(rf"\bx\s*=\s*({_NUMBER.pattern})\s*,\s*y\s*=\s*({_NUMBER.pattern})\s*(?:,|$)")
# What may stand beside the numbers in an answer that is nothing but coordinates.
_COORDINATE_WORDS = re.compile(
    r"<\|?/?(?:point|box|points|box_start|box_end)\|?>|\b(?:x|y|point|box|bbox|bbox_2d|point_2d|coordinate|coordinates|json|label)\b",
    re.IGNORECASE,
)


def coordinate_text(text: str) -> str:
    """The part of an answer that gives a place: the pair of a pyautogui call, a tool call, or all where it is no more.

    Raises DropError with the reason: no coordinates, or several.
    """
    pairs = (_pair_of_call(name, arguments) for name, arguments in _CALL.findall(text))
    calls = [f"({x}, {y})" for x, y in filter(None, pairs)]
    tools = [match.group(0) for match in _TOOL.finditer(text) if '"coordinate' in match.group(1)]
    found = calls or tools
    if len(found) > 1:
        raise DropError(SEVERAL)
    if found:
        return found[0]
    bare = _COORDINATE_WORDS.sub("", text)
    if re.search(r"[^\W\d_]", bare) or not 2 <= len(_NUMBER.findall(bare)) <= 4:
        raise DropError(NONE)
    return text


def _pair_of_call(name: str, arguments: str) -> tuple[str, str] | None:
    """x and y as written, of a pyautogui call that goes to a place; a duration, a key or a text is none."""
    if name not in (*POINTER_CALLS, "scroll"):
        return None
    by_position = None if name == "scroll" else _FIRST_TWO.match(arguments)  # scroll's first argument is how far
    match = by_position or _BY_NAME.search(arguments)
    return (match.group(1), match.group(2)) if match else None


def read_place(text: str, image_size: tuple[int, int], system: str) -> Answer:
    """Point or box of an answer in absolute pixels. Raises DropError with the reason.

    image_size: (width, height) of the original image; system: one of SYSTEMS, what the numbers mean in this corpus.
    """
    place = coordinate_text(text)
    answer = parse_answer(place, image_size=image_size, format="point")
    if answer.point is None:
        raise DropError("coordinates not understood")
    is_fraction = answer.coordinates == "fraction"
    if is_fraction != (system == "fraction"):
        wrong = "fractions 0-1 where others were" if is_fraction else "no fractions 0-1 where they were"
        raise DropError(f"{wrong} expected (see --coordinates)")
    if system == "absolute":
        answer = parse_answer(place, image_size=image_size, format="point_absolute")
    assert answer.point is not None
    corners = answer.box or answer.point
    if not all(0 <= side <= image_size[index % 2] for index, side in enumerate(corners)):
        raise DropError("coordinates outside the image")
    return answer


def write_place(answer: Answer, image_size: tuple[int, int], form: str) -> str:
    """The place relative 0-1000 in the form asked for (one of ANSWERS); `auto` keeps points points and boxes boxes.

    Raises DropError for a box that is wanted where only a point is known.
    """
    assert answer.point is not None
    if form == "box" or (form == "auto" and answer.box is not None):
        if answer.box is None:
            raise DropError("a point where a box was wanted")
        return format_box(answer.box, image_size)
    return format_point(*answer.point, image_size, format="tool_call" if form == "tool_call" else "point")
