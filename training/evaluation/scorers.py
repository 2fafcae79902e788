"""What an answer is worth: one small function per published metric, each from a text and a target to a `Verdict`.

Texts are scored as they were generated, reasoning before `</think>` left out. Every score lies within 0 and 1.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pixelprune.answers import Point, parse_answer
from training.evaluation.targets import Target

ANLS_THRESHOLD = 0.5
RELAXED_TOLERANCE = 0.05
REFUSAL = (-1, -1)
"""The place that stands for "there is no such thing on the screen" (OSWorld-G)."""


@dataclass(frozen=True)
class Verdict:
    """A scored answer. score: 0 to 1, None where the benchmark brings its own scorer. point: absolute pixels where the
    answer is a place that was read. problem: why nothing was read, "" otherwise."""

    score: float | None
    point: Point | None = None
    problem: str = ""


def score_answer(text: str, target: Target, image_size: tuple[int, int] | None, answer_format: str) -> Verdict:
    """Score by the target's own scorer. image_size: (width, height) of the record's last image, None without any."""
    if target.scorer == "place":
        if image_size is None:
            raise ValueError("a place needs an image")
        return score_place(text, target, image_size, answer_format)
    return TEXT_SCORERS[target.scorer](without_reasoning(text), target)


def score_place(text: str, target: Target, image_size: tuple[int, int], answer_format: str) -> Verdict:
    """1 when the point lies in the box or polygon, borders of the box included, or refuses where that is right.

    A box answers with its centre. A refusal is the place (-1, -1), as OSWorld-G writes it.
    """
    refuses = is_refusal(text)
    if target.is_refusal or refuses:
        return Verdict(float(target.is_refusal and refuses))
    answer = parse_answer(text, image_size=image_size, format=answer_format)
    if answer.point is None:
        return Verdict(0.0, None, answer.problem)
    if target.polygon:
        hit = is_in_polygon(answer.point, target.polygon)
    else:
        assert target.box is not None
        x1, y1, x2, y2 = target.box
        hit = x1 <= answer.point[0] <= x2 and y1 <= answer.point[1] <= y2
    return Verdict(float(hit), answer.point)


def is_refusal(text: str) -> bool:
    """Whether the place that a text names is (-1, -1). Numbers are taken as written: no system of coordinates is read
    into them."""
    point = parse_answer(text, image_size=(1, 1), format="point_absolute").point
    return point == REFUSAL


def is_in_polygon(point: Point, polygon: Sequence[Point]) -> bool:
    """Even-odd rule: whether a ray to the right crosses the outline an odd number of times."""
    x, y = point
    inside = False
    for (x1, y1), (x2, y2) in zip(polygon, [*polygon[1:], polygon[0]], strict=True):
        if (y1 > y) != (y2 > y) and x < x1 + (y - y1) * (x2 - x1) / (y2 - y1):
            inside = not inside
    return inside


def without_reasoning(text: str) -> str:
    return text.rpartition("</think>")[2].strip()


def score_anls(text: str, target: Target) -> Verdict:
    """Average normalised Levenshtein similarity of one question: 1 - distance / length to the nearest reference, 0
    below 0.5. Biten et al. 2019, as the script of the DocVQA challenge computes it: letters in small, spaces joined,
    length of the longer of the two."""
    return Verdict(max(_similarity(text, reference) for reference in target.references))


def _similarity(text: str, reference: str) -> float:
    # The lengths are those before spaces are joined, as in the challenge's script.
    length = max(len(text), len(reference))
    if not length:
        return 1.0
    similarity = 1 - levenshtein(_joined(text), _joined(reference)) / length
    return similarity if similarity >= ANLS_THRESHOLD else 0.0


def _joined(text: str) -> str:
    return " ".join(text.lower().split())


def levenshtein(one: str, other: str) -> int:
    """Fewest insertions, deletions and substitutions of one character between two texts; time is their product."""
    if len(one) > len(other):
        one, other = other, one
    row = list(range(len(one) + 1))
    for number, letter in enumerate(other, start=1):
        corner, row[0] = row[0], number
        for place, own in enumerate(one, start=1):
            corner, row[place] = row[place], min(row[place] + 1, row[place - 1] + 1, corner + (own != letter))
    return row[-1]


def score_relaxed(text: str, target: Target) -> Verdict:
    """Relaxed accuracy of ChartQA: numbers within 5 % of the reference, "12%" read as 0.12; else equal texts."""
    return Verdict(float(any(_is_relaxed_equal(text, reference.strip()) for reference in target.references)))


def _is_relaxed_equal(text: str, reference: str) -> bool:
    found, expected = _number(text), _number(reference)
    if found is not None and expected:
        return abs(found - expected) / abs(expected) <= RELAXED_TOLERANCE
    return text.lower() == reference.lower()


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def score_exact(text: str, target: Target) -> Verdict:
    """1 for a text that is one of the references; case, outer spaces and a final full stop do not count."""

    def plain(value: str) -> str:
        return _joined(value).removesuffix(".")

    return Verdict(float(plain(text) in {plain(reference) for reference in target.references}))


def score_contains(text: str, target: Target) -> Verdict:
    """OCRBench: 1 when a reference stands anywhere in the answer, in small letters, line breaks as spaces."""

    def plain(value: str) -> str:
        return value.lower().strip().replace("\n", " ")

    return Verdict(float(any(plain(reference) in plain(text) for reference in target.references)))


def score_contains_formula(text: str, target: Target) -> Verdict:
    """OCRBench's handwritten formulas (HME100k): as `score_contains`, but case counts and spaces do not."""

    def plain(value: str) -> str:
        return value.strip().replace("\n", " ").replace(" ", "")

    return Verdict(float(any(plain(reference) in plain(text) for reference in target.references)))


# Letters are capitals: "the answer is a cat" names no option, and "A cat" opens with a word.
_SAID = re.compile(r"(?i:answer|option|choice)\s{0,4}(?i:is)?\W{0,6}([A-Z])\b(?!['’])")
_OPENING = re.compile(r"\W{0,4}([A-Za-z])\s{0,2}(?:[.):,\]*]|$)")
_MARKED = re.compile(r"[(\[*]([A-Z])[)\]*]")


def score_option(text: str, target: Target) -> Verdict:
    """1 for the letter of the right option. Read from a letter that opens the answer ("B.", "(b)"), "answer is B", a
    marked letter such as "(B)", or an answer that is one option's own text, in this order."""
    letter = read_option(text, target.options)
    if letter is None:
        return Verdict(0.0, None, "no option found")
    return Verdict(float(letter in {reference.strip().upper() for reference in target.references}))


def read_option(text: str, options: Sequence[str]) -> str | None:
    """The letter that an answer gives, of as many options as there are; None when it gives none."""
    letters = [chr(ord("A") + number) for number in range(len(options))]
    opening = _OPENING.match(text)
    found = ([opening.group(1).upper()] if opening else []), _SAID.findall(text), _MARKED.findall(text)
    for letters_found in found:
        known = [letter for letter in letters_found if letter in letters]
        if known:
            return known[-1]
    own = [letter for letter, option in zip(letters, options, strict=True) if _joined(option) == _joined(text)]
    return own[0] if len(own) == 1 else None


def score_elsewhere(text: str, target: Target) -> Verdict:
    """No verdict: the benchmark's own scorer reads the predictions file."""
    return Verdict(None)


TEXT_SCORERS: dict[str, Callable[[str, Target], Verdict]] = {
    "anls": score_anls,
    "relaxed": score_relaxed,
    "exact": score_exact,
    "contains": score_contains,
    "contains_formula": score_contains_formula,
    "option": score_option,
    "predictions": score_elsewhere,
}
