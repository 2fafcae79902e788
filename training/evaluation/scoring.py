"""Scoring of grounding answers: is the point in the box, overall and by subset and kind of element; failures counted.

Scores are sums over predictions, so that ranks and resumed passes add up to the same figures in any order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from pixelprune.answers import Answer, Box, parse_answer
from pixelprune.records.record import Record


class GroundingError(ValueError):
    """A record that cannot be evaluated: the message says what is missing."""


@dataclass(frozen=True)
class Target:
    """Where the answer of a record must lie.

    box: x1, y1, x2, y2 in pixels of the original image. image_size: (width, height), None when the record does not
    say: it is then taken from the image. subset, element: names to group by ("" where the record has none).
    """

    box: Box
    image_size: tuple[int, int] | None
    subset: str
    element: str


def target_of(record: Record) -> Target:
    """Read `metadata.bbox` (pixels), `image_size`, `subset` (else `source`) and `element`.

    Raises GroundingError when there is no box, several or one without area, or an image_size that is none.
    """
    box = record.metadata.get("bbox")
    if box is None:
        raise GroundingError("no metadata.bbox: nothing to compare an answer with")
    if isinstance(box[0], list | tuple):
        raise GroundingError(f"metadata.bbox holds {len(box)} boxes: expected four numbers, one box to be clicked")
    x1, y1, x2, y2 = box
    if not (x1 < x2 and y1 < y2):
        raise GroundingError(f"metadata.bbox {list(box)}: expected x1 < x2 and y1 < y2, in pixels")
    image_size = _image_size(record.metadata.get("image_size"))
    subset = record.metadata.get("subset") or record.metadata.get("source") or ""
    return Target((x1, y1, x2, y2), image_size, str(subset), str(record.metadata.get("element") or ""))


def _image_size(value: Any) -> tuple[int, int] | None:
    if value is None:
        return None

    def is_side(side: Any) -> bool:
        return (type(side) is int or (type(side) is float and side.is_integer())) and side > 0

    if not (isinstance(value, list | tuple) and len(value) == 2 and all(map(is_side, value))):
        raise GroundingError(f"metadata.image_size {value!r:.80}: expected [width, height], two positive whole numbers")
    return int(value[0]), int(value[1])


@dataclass(frozen=True)
class Prediction:
    """One record's answer and verdict; a line of the predictions file.

    text: the answer as generated, "" when generation failed; error: why it failed, "" otherwise.
    point: absolute pixels, None when not read; problem: why it was not read (see `pixelprune.answers`).
    first_token_s: wall time from the prepared prompt to the first token, of the whole batch the record was in.
    fingerprint: of the record that was answered (see `training.evaluation.answering.Task`).
    """

    id: str
    text: str
    hit: bool
    point: tuple[float, float] | None
    problem: str
    error: str
    box: Box
    image_size: tuple[int, int] | None
    subset: str
    element: str
    kept_blocks: int = 0
    full_blocks: int = 0
    num_generated: int = 0
    first_token_s: float | None = None
    fingerprint: str = ""

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Prediction:
        """The inverse of `dataclasses.asdict`, through JSON. Raises TypeError for other keys."""
        row = dict(row)
        for key in ("point", "box", "image_size"):
            row[key] = tuple(row[key]) if row[key] is not None else None
        return cls(**row)


def judge(
    record_id: str, target: Target, text: str, image_size: tuple[int, int], answer_format: str, **facts: Any
) -> Prediction:
    """Read an answer and compare it with the target; whatever the text is, there is a verdict.

    facts: kept_blocks, full_blocks, num_generated, first_token_s.
    """
    answer = parse_answer(text, image_size=image_size, format=answer_format)
    return Prediction(
        record_id,
        text,
        is_hit(answer, target.box),
        answer.point,
        answer.problem,
        "",
        target.box,
        image_size,
        target.subset,
        target.element,
        **facts,
    )


def failed(record_id: str, target: Target, error: str, **facts: Any) -> Prediction:
    """A record whose generation failed: a miss with its error, and no answer of any other record."""
    return Prediction(
        record_id, "", False, None, "", error, target.box, target.image_size, target.subset, target.element, **facts
    )


def is_hit(answer: Answer, box: Box) -> bool:
    """Whether the point lies in the box, borders included."""
    if answer.point is None:
        return False
    x, y = answer.point
    return box[0] <= x <= box[2] and box[1] <= y <= box[3]


@dataclass
class Score:
    """Counts over some predictions.

    first_tokens_s: one time per prediction that has one; batches weigh as many times as they have records.
    """

    num: int = 0
    num_hits: int = 0
    num_unparsed: int = 0
    num_failed: int = 0
    kept_blocks: int = 0
    full_blocks: int = 0
    num_generated: int = 0
    first_tokens_s: list[float] = field(default_factory=list)

    def add(self, prediction: Prediction) -> None:
        self.num += 1
        self.num_hits += prediction.hit
        self.num_failed += bool(prediction.error)
        self.num_unparsed += prediction.point is None and not prediction.error
        self.kept_blocks += prediction.kept_blocks
        self.full_blocks += prediction.full_blocks
        self.num_generated += prediction.num_generated
        if prediction.first_token_s is not None:
            self.first_tokens_s.append(prediction.first_token_s)

    def summary(self) -> dict[str, float | int | None]:
        """Figures for a report; None where there is nothing to divide by.

        accuracy: hits / all records, parse failures and failed generations included as misses.
        """
        answered = self.num - self.num_failed
        return {
            "num": self.num,
            "accuracy": self.num_hits / self.num if self.num else None,
            "num_unparsed": self.num_unparsed,
            "num_failed": self.num_failed,
            "retain_ratio": self.kept_blocks / self.full_blocks if self.full_blocks else None,
            "tokens_per_answer": self.num_generated / answered if answered else None,
            "first_token_s": median(self.first_tokens_s) if self.first_tokens_s else None,
        }


def summarise(predictions: Iterable[Prediction]) -> dict[str, dict[str, Any]]:
    """{"overall": {"all": ...}, "subset": {name: ...}, "element": {text, icon: ...}}, each a `Score.summary`."""
    scores: dict[str, dict[str, Score]] = {"overall": {"all": Score()}, "subset": {}, "element": {}}
    for prediction in predictions:
        scores["overall"]["all"].add(prediction)
        for group, name in (("subset", prediction.subset), ("element", prediction.element)):
            if name:
                scores[group].setdefault(name, Score()).add(prediction)
    return {
        group: {name: score.summary() for name, score in sorted(members.items())} for group, members in scores.items()
    }


def to_row(prediction: Prediction) -> dict[str, Any]:
    """A prediction as JSON takes it."""
    return asdict(prediction)
