"""Grounding answers: how a click point or a box is written, and one parser that reads the usual ways.

Coordinate systems: Qwen3-VL writes integers 0-1000 relative to the image's width and height, Qwen2.5-VL absolute
pixels; some corpora write fractions 0-1. Points and boxes of an `Answer` are always absolute pixels of the image.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = [
    "FORMATS",
    "GROUNDING_TOKENS",
    "MAX_TEXT_LEN",
    "POINTER_CALLS",
    "RELATIVE",
    "Answer",
    "centre_of",
    "format_box",
    "format_place",
    "format_point",
    "format_words",
    "parse_answer",
    "to_absolute",
    "to_relative",
]

RELATIVE = 1000
"""Relative coordinates run from 0 to this."""
FORMATS = ("auto", "point", "box", "point_absolute", "box_absolute", "tool_call", "tool_call_absolute")
GROUNDING_TOKENS = (
    "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>",
)  # fmt: skip
"""Tokens of the Qwen vocabularies around the words of a thing, the corners of its box and of a quadrilateral."""
MAX_TEXT_LEN = 20_000
"""Only this many last characters of an answer are read: a model that babbles ends with its answer, if with any."""
POINTER_CALLS = (
    "click", "doubleClick", "tripleClick", "rightClick", "middleClick", "leftClick",
    "moveTo", "dragTo", "mouseDown", "mouseUp",
)  # fmt: skip
"""Calls of pyautogui whose first two arguments are a place."""

Point = tuple[float, float]
Box = tuple[float, float, float, float]

# Runs of spaces are bounded everywhere: no answer, however odd, may cost more than time linear in its length.
_S = r"\s{0,8}"
_NUMBER = r"[-+]?\d{1,7}(?:\.\d{1,17})?"
_PAIR = rf"({_NUMBER})(?:{_S}[,;]{_S}|\s{{1,8}})({_NUMBER})"
_STRICT_POINT = re.compile(rf"\({_S}({_NUMBER}){_S},{_S}({_NUMBER}){_S}\)")
_STRICT_BOX = re.compile(rf"\[{_S}({_NUMBER})" + rf"{_S},{_S}({_NUMBER})" * 3 + rf"{_S}\]")
_STRICT_TOOL = re.compile(r"<tool_call>\s*(\{.*\})\s*</tool_call>", re.DOTALL)
# Loose shapes, most explicit first. The last match of the first shape that matches anywhere wins.
_LOOSE = (
    re.compile(rf"<box>{_S}[(\[]{{0,2}}{_S}{_PAIR}{_S}\)?{_S},?{_S}\(?{_S}{_PAIR}{_S}[)\]]{{0,2}}{_S}</box>"),
    re.compile(rf"<\|box_start\|>{_S}\({_S}{_PAIR}{_S}\){_S}(?:,{_S}\({_S}{_PAIR}{_S}\){_S})?<\|box_end\|>"),
    re.compile(rf"<point>{_S}\(?{_S}{_PAIR}{_S}\)?{_S}</point>"),
    re.compile(rf"\bx{_S}[=:]{_S}[\"']?({_NUMBER})[\"']?{_S},?{_S}\by{_S}[=:]{_S}[\"']?({_NUMBER})"),
    re.compile(rf"[\[(]{_S}[\[(]?{_S}{_PAIR}{_S}[\])]?{_S},{_S}[\[(]?{_S}{_PAIR}{_S}[\])]?{_S}[\])]"),
    re.compile(rf"\({_S}{_PAIR}{_S}\){_S},?{_S}\({_S}{_PAIR}{_S}\)"),
    re.compile(rf"[\[(]{_S}{_PAIR}{_S}[\])]"),
    re.compile(rf"\b(?:Click|{'|'.join(POINTER_CALLS)})\({_S}{_PAIR}{_S}[,)]"),
    re.compile(rf"^\W{{0,8}}{_PAIR}\W{{0,8}}$"),
)
_CORNER_KEYS = ("quad_2d", "points", "polygon")
"""Corners of one thing, four but for a polygon: the place is the centre."""
_KEYS = ("coordinate", "point_2d", "bbox_2d", "point", "bbox", "box", "position", "start_box", "coordinates")


@dataclass(frozen=True)
class Answer:
    """What an answer says. `point` (the box's centre for a box) and `box`: absolute pixels, None when not read."""

    text: str
    point: Point | None = None
    box: Box | None = None
    coordinates: str = ""
    """relative, absolute or fraction: the system the numbers were read in."""
    problem: str = ""
    """Why nothing was read; empty when it was."""

    @property
    def is_parsed(self) -> bool:
        return self.point is not None


def centre_of(corners: Sequence[Point]) -> Point:
    """Of four corners their mean; of another polygon the centre of its area, which lies inside where it is convex."""
    area, x, y = 0.0, 0.0, 0.0
    for (x1, y1), (x2, y2) in zip(corners, [*corners[1:], corners[0]], strict=True):
        cross = x1 * y2 - x2 * y1
        area, x, y = area + cross, x + (x1 + x2) * cross, y + (y1 + y2) * cross
    if len(corners) == 4 or abs(area) < 1e-9:
        return sum(c[0] for c in corners) / len(corners), sum(c[1] for c in corners) / len(corners)
    return x / (3 * area), y / (3 * area)


def to_relative(x: float, y: float, image_size: tuple[int, int]) -> tuple[int, int]:
    """Absolute pixels -> relative 0-1000, rounded half up. image_size: (width, height) of the original image."""
    width, height = image_size
    return math.floor(x * RELATIVE / width + 0.5), math.floor(y * RELATIVE / height + 0.5)


def to_absolute(x: float, y: float, image_size: tuple[int, int]) -> Point:
    """Relative 0-1000 -> absolute pixels. image_size: (width, height)."""
    return x * image_size[0] / RELATIVE, y * image_size[1] / RELATIVE


def format_point(x: float, y: float, image_size: tuple[int, int], *, format: str = "point") -> str:
    """A point (absolute pixels) as `(x, y)` or as a tool call, in any FORMATS name but auto and the boxes.

    Raises ValueError for another format.
    """
    if format not in ("point", "point_absolute", "tool_call", "tool_call_absolute"):
        raise ValueError(
            f"format_point: expected point, point_absolute, tool_call or tool_call_absolute, got {format!r}"
        )
    px, py = _rounded(x, y, image_size, absolute=format.endswith("_absolute"))
    if format.startswith("point"):
        return f"({px}, {py})"
    call = {"name": "computer_use", "arguments": {"action": "left_click", "coordinate": [px, py]}}
    return f"<tool_call>\n{json.dumps(call)}\n</tool_call>"


def format_box(box: Box, image_size: tuple[int, int], *, format: str = "box") -> str:
    """A box (x1, y1, x2, y2 in absolute pixels) as `[x1, y1, x2, y2]`. Raises ValueError for another format."""
    if format not in ("box", "box_absolute"):
        raise ValueError(f"format_box: expected box or box_absolute, got {format!r}")
    absolute = format.endswith("_absolute")
    corners = [*_rounded(box[0], box[1], image_size, absolute=absolute)]
    corners += _rounded(box[2], box[3], image_size, absolute=absolute)
    return json.dumps(corners)


def format_place(
    place: Sequence[float], image_size: tuple[int, int], *, format: str, tokens: bool = False, is_answer: bool = True
) -> str:
    """A point (x, y) or a box (x1, y1, x2, y2), absolute pixels, in one of FORMATS; `auto` keeps points and boxes.

    tokens: as Qwen2-VL writes places, `<|box_start|>(x1,y1),(x2,y2)<|box_end|>`. is_answer: False for a question, where
    a place is named, not answered with: the format then says no more than what its numbers are.
    Raises ValueError for a point where the format is a box's, and for a tool call between tokens.
    """
    absolute = format.endswith("_absolute")
    shape = format.removesuffix("_absolute") if is_answer else "auto"
    if shape == "auto":
        shape = "point" if len(place) == 2 else "box"
    if shape == "box" and len(place) == 2:
        raise ValueError(f"a point where the answer format {format} wants a box")
    if shape != "box" and len(place) == 4:
        place = ((place[0] + place[2]) / 2, (place[1] + place[3]) / 2)
    if not tokens:
        name = f"{shape}_absolute" if absolute else shape
        if shape == "box":
            return format_box((place[0], place[1], place[2], place[3]), image_size, format=name)
        return format_point(place[0], place[1], image_size, format=name)
    if shape == "tool_call":
        raise ValueError("a tool call has no place for box tokens; expected the answer format auto, point or box")
    corners = [_rounded(x, y, image_size, absolute=absolute) for x, y in zip(place[::2], place[1::2], strict=True)]
    return f"<|box_start|>{','.join(f'({x},{y})' for x, y in corners)}<|box_end|>"


def format_words(words: str, *, tokens: bool = False) -> str:
    """The words for a thing, as they are or between the model's own tokens for them."""
    return f"<|object_ref_start|>{words}<|object_ref_end|>" if tokens else words


def _rounded(x: float, y: float, image_size: tuple[int, int], *, absolute: bool) -> tuple[int, int]:
    return (math.floor(x + 0.5), math.floor(y + 0.5)) if absolute else to_relative(x, y, image_size)


def parse_answer(text: object, *, image_size: tuple[int, int], format: str = "auto", strict: bool = False) -> Answer:
    """Read the point or box of a model's answer; whatever the text is, this returns and never raises.

    image_size: (width, height) of the original image, pixels. format: one of FORMATS. It names the coordinate system
    and, when `strict`, the one shape that is accepted with nothing around it and inside the image. Tolerant mode takes
    the last point or box of the text, after any `</think>`, in any known shape. `auto` reads numbers as relative
    0-1000, as fractions where all are within 0-1 and a decimal point is written, as pixels where one is over 1000.
    Raises ValueError for an unknown format or an impossible image size only: mistakes of the caller.
    """
    if format not in FORMATS:
        raise ValueError(f"answer format: expected one of {', '.join(FORMATS)}, got {format!r}")
    if min(image_size) <= 0:
        raise ValueError(f"image_size: expected a positive (width, height), got {image_size}")
    if not isinstance(text, str):
        return Answer(text=repr(text)[:200], problem="not a text")
    body = text[-MAX_TEXT_LEN:].strip()
    if not body:
        return Answer(text, problem="empty")
    numbers = _read_strict(body, format) if strict else _read_loose(body.rpartition("</think>")[2])
    if numbers is None:
        return Answer(text, problem="no point or box found")
    return _answer(text, numbers, image_size, _system(numbers, format, strict), strict)


def _system(numbers: list[float], format: str, strict: bool) -> str:
    if format.endswith("_absolute"):
        return "absolute"
    # Whole numbers are kept as int: (1, 1) is the image's corner, (1.0, 0.5) are fractions.
    is_fractional = any(isinstance(n, float) for n in numbers) and all(0 <= n <= 1 for n in numbers)
    if is_fractional and (format == "auto" or not strict):
        return "fraction"
    return "absolute" if format == "auto" and max(numbers) > RELATIVE else "relative"


def _answer(text: str, numbers: list[float], image_size: tuple[int, int], system: str, strict: bool) -> Answer:
    unit = {"relative": RELATIVE, "fraction": 1.0}
    scale_x, scale_y = (side / unit[system] if system in unit else 1.0 for side in image_size)
    pixels = [n * (scale_y if i % 2 else scale_x) for i, n in enumerate(numbers)]
    if strict and not all(0 <= n <= image_size[i % 2] for i, n in enumerate(pixels)):
        return Answer(text, problem="outside the image")
    if len(pixels) == 2:
        return Answer(text, (pixels[0], pixels[1]), None, system)
    if len(pixels) > 4:
        return Answer(text, centre_of(list(zip(pixels[::2], pixels[1::2], strict=True))), None, system)
    x1, y1, x2, y2 = pixels
    if strict and (x1 > x2 or y1 > y2):
        return Answer(text, problem="box corners out of order")
    box = (min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2))
    return Answer(text, ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2), box, system)


def _read_strict(body: str, format: str) -> list[float] | None:
    """Numbers of a text that is exactly one canonical answer of this format, else None."""
    shape = format.removesuffix("_absolute")
    if shape in ("point", "auto") and (match := _STRICT_POINT.fullmatch(body)):
        return _parsed(match)
    if shape in ("box", "auto") and (match := _STRICT_BOX.fullmatch(body)):
        return _parsed(match)
    if shape in ("tool_call", "auto") and (match := _STRICT_TOOL.fullmatch(body)):
        call = _loads(match.group(1))
        arguments = call.get("arguments") if isinstance(call, dict) else None
        numbers = _numbers(arguments.get("coordinate")) if isinstance(arguments, dict) else None
        return numbers if numbers is not None and len(numbers) == 2 else None
    return None


def _read_loose(body: str) -> list[float] | None:
    """Numbers of the last point or box in the text, of the most explicit shape there is, else None."""
    found = [numbers for value in _json_values(body) if (numbers := _from_json(value)) is not None]
    if found:
        return found[-1]
    for shape in _LOOSE:
        matches = list(shape.finditer(body))
        if matches:
            return _parsed(matches[-1])
    return None


def _parsed(match: re.Match[str]) -> list[float]:
    return [_number(n) for n in match.groups() if n is not None]


def _number(text: str) -> float:
    """An int where no decimal point is written, else a float."""
    return float(text) if "." in text else int(text)


def _loads(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _json_values(body: str, max_tries: int = 64) -> Iterator[Any]:
    """JSON objects, and lists of them, that stand anywhere in the text."""
    decoder = json.JSONDecoder()
    position = 0
    for _ in range(max_tries):
        match = re.compile(r"[\[{]").search(body, position)
        if match is None:
            return
        position = match.start()
        try:
            value, position = decoder.raw_decode(body, position)
        except (ValueError, RecursionError):
            position += 1
            continue
        yield value


def _from_json(value: Any, depth: int = 4) -> list[float] | None:
    """Coordinates under one of the known keys, looked for in nested arguments and lists; the last one wins."""
    if depth == 0:
        return None
    if isinstance(value, list):
        found = [n for item in value if isinstance(item, (dict, list)) and (n := _from_json(item, depth - 1))]
        return found[-1] if found else None
    if not isinstance(value, dict):
        return None
    for key in _CORNER_KEYS:
        if (corners := _corners(value.get(key), 3 if key == "polygon" else 4)) is not None:
            return corners
    for key in _KEYS:
        if (numbers := _numbers(value.get(key))) is not None:
            return numbers
    if (numbers := _numbers([value.get("x"), value.get("y")])) is not None:
        return numbers
    nested = [n for item in value.values() if isinstance(item, (dict, list)) and (n := _from_json(item, depth - 1))]
    return nested[-1] if nested else None


def _corners(value: Any, least: int) -> list[float] | None:
    """The finite numbers of a quadrilateral, or of a polygon where `least` is three, flat or as pairs, else None."""
    if isinstance(value, list) and all(isinstance(v, list) and len(v) == 2 for v in value):
        value = [side for corner in value for side in corner]
    if not isinstance(value, list) or len(value) % 2 or len(value) < 2 * least or (least == 4 and len(value) != 8):
        return None
    pairs = [_numbers(value[i : i + 2]) for i in range(0, len(value), 2)]
    return None if None in pairs else [n for pair in pairs if pair for n in pair]


def _numbers(value: Any) -> list[float] | None:
    """Two or four finite numbers (also as a text like "(12, 34)"), else None."""
    if isinstance(value, str):
        value = [_number(n) for n in re.findall(_NUMBER, value[:200])]
    if isinstance(value, list) and len(value) == 2 and all(isinstance(v, list) and len(v) == 2 for v in value):
        value = [*value[0], *value[1]]
    if not isinstance(value, list) or len(value) not in (2, 4):
        return None
    if not all(isinstance(v, (int, float)) and not isinstance(v, bool) and abs(v) < 1e9 for v in value):
        return None  # NaN and infinities compare false
    return list(value)
