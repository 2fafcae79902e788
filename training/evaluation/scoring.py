"""Answers to predictions and sums: overall, by benchmark, subset and kind of element; failures counted as misses.

Scores are sums over predictions, so that ranks and resumed passes add up to the same figures in any order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from pixelprune.answers import Box, Point
from training.evaluation.scorers import score_answer
from training.evaluation.targets import Target


@dataclass(frozen=True)
class Prediction:
    """One record's answer and verdict; a line of the predictions file.

    text: the answer as generated, "" when generation failed; error: why it failed, "" otherwise.
    score: 0 to 1 by `scorer`, None where the benchmark brings its own scorer.
    point: absolute pixels, None when not read; problem: why nothing was read (see `pixelprune.answers`).
    prefill_flops, prefill_flops_square: of the prompt up to the first token; causal attention counted by half, and as
    the whole square, which is the paper's convention. None where generation failed.
    first_token_s: wall time from the prepared prompt to the first token, of the whole batch the record was in.
    fingerprint: of the record that was answered (see `training.evaluation.answering.Task`).
    source_id: the record's own id, as its benchmark publishes it; `id` names its file and row.
    all_of: names the question of which this is one asking (see `training.evaluation.targets.Target`).
    """

    id: str
    text: str
    score: float | None
    point: Point | None
    problem: str
    error: str
    scorer: str
    references: tuple[str, ...]
    box: Box | None
    polygon: tuple[Point, ...]
    image_size: tuple[int, int] | None
    benchmark: str
    subset: str
    element: str
    kept_blocks: int = 0
    full_blocks: int = 0
    num_generated: int = 0
    first_token_s: float | None = None
    fingerprint: str = ""
    all_of: str = ""
    source_id: str = ""
    prefill_flops: float | None = None
    prefill_flops_square: float | None = None

    @property
    def hit(self) -> bool:
        """Wholly right."""
        return self.score == 1

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Prediction:
        """The inverse of `dataclasses.asdict`, through JSON. Raises TypeError for other keys."""
        row = dict(row)
        for key in ("point", "box", "image_size", "references"):
            row[key] = tuple(row[key]) if row[key] is not None else None
        row["polygon"] = tuple(map(tuple, row["polygon"]))
        return cls(**row)


def judge(
    record_id: str, target: Target, text: str, image_size: tuple[int, int] | None, answer_format: str, **facts: Any
) -> Prediction:
    """Read an answer and compare it with the target; whatever the text is, there is a verdict.

    image_size: (width, height) of the record's last image. facts: kept_blocks, full_blocks, num_generated,
    first_token_s.
    """
    verdict = score_answer(text, target, image_size, answer_format)
    return _prediction(record_id, target, image_size, text=text, error="", **vars(verdict), **facts)


def failed(record_id: str, target: Target, error: str, **facts: Any) -> Prediction:
    """A record whose generation failed: a miss with its error, and no answer of any other record."""
    # What is scored elsewhere has no verdict here, missing answers included.
    score = None if target.scorer == "predictions" else 0.0
    facts |= {"text": "", "score": score, "point": None, "problem": "", "error": error}
    return _prediction(record_id, target, target.image_size, **facts)


def _prediction(record_id: str, target: Target, image_size: tuple[int, int] | None, **facts: Any) -> Prediction:
    shared = {
        name: getattr(target, name)
        for name in ("scorer", "references", "box", "polygon", "benchmark", "subset", "element", "all_of", "source_id")
    }
    return Prediction(id=record_id, image_size=image_size, **shared, **facts)


@dataclass
class Score:
    """Counts over some predictions.

    num_counted, prefill_flops, prefill_flops_square: predictions whose FLOPs are known, and their sums.
    least: the least score of each question that is asked several times.
    first_tokens_s: one time per prediction that has one; batches weigh as many times as they have records.
    """

    num: int = 0
    num_scored: int = 0
    sum_of_scores: float = 0.0
    least: dict[tuple[str, str], float] = field(default_factory=dict)
    num_unparsed: int = 0
    num_failed: int = 0
    kept_blocks: int = 0
    full_blocks: int = 0
    num_generated: int = 0
    num_counted: int = 0
    prefill_flops: float = 0.0
    prefill_flops_square: float = 0.0
    first_tokens_s: list[float] = field(default_factory=list)

    def add(self, prediction: Prediction) -> None:
        self.num += 1
        if prediction.score is not None and prediction.all_of:
            question = (prediction.benchmark, prediction.all_of)
            self.least[question] = min(prediction.score, self.least.get(question, 1.0))
        elif prediction.score is not None:
            self.num_scored += 1
            self.sum_of_scores += prediction.score
        self.num_failed += bool(prediction.error)
        self.num_unparsed += bool(prediction.problem)
        self.kept_blocks += prediction.kept_blocks
        self.full_blocks += prediction.full_blocks
        self.num_generated += prediction.num_generated
        if prediction.prefill_flops is not None and prediction.prefill_flops_square is not None:
            self.num_counted += 1
            self.prefill_flops += prediction.prefill_flops
            self.prefill_flops_square += prediction.prefill_flops_square
        if prediction.first_token_s is not None:
            self.first_tokens_s.append(prediction.first_token_s)

    def summary(self) -> dict[str, float | int | None]:
        """Figures for a report; None where there is nothing to divide by.

        accuracy: mean score of all questions, parse failures and failed generations included as misses; None where the
        benchmark brings its own scorer. Records that are one question together count once, with their least score.
        """
        answered = self.num - self.num_failed
        questions = self.num_scored + len(self.least)
        return {
            "num": self.num,
            "accuracy": (self.sum_of_scores + sum(self.least.values())) / questions if questions else None,
            "num_unparsed": self.num_unparsed,
            "num_failed": self.num_failed,
            "retain_ratio": self.kept_blocks / self.full_blocks if self.full_blocks else None,
            "tokens_per_answer": self.num_generated / answered if answered else None,
            # Sums over all records, or nothing: ratios of sums over different records would say nothing.
            "prefill_flops": self.prefill_flops if self.num_counted == self.num else None,
            "prefill_flops_square": self.prefill_flops_square if self.num_counted == self.num else None,
            "first_token_s": median(self.first_tokens_s) if self.first_tokens_s else None,
        }


def summarise(predictions: Iterable[Prediction]) -> dict[str, dict[str, Any]]:
    """{"overall": {"all": ...}, "benchmark", "subset", "element": {name: ...}}, each a `Score.summary`.

    Those of benchmarks carry `macro` as well, the mean of their subsets' accuracies, which is what the paper calls Avg.
    Subsets of several benchmarks are named BENCHMARK/SUBSET.
    """
    rows = sorted(predictions, key=lambda prediction: prediction.id)  # sums of floats depend on their order
    benchmarks = {prediction.benchmark for prediction in rows}
    scores: dict[str, dict[str, Score]] = {"overall": {"all": Score()}, "benchmark": {}, "subset": {}, "element": {}}
    subsets_of: dict[str, dict[str, Score]] = {}
    for prediction in rows:
        scores["overall"]["all"].add(prediction)
        if prediction.subset:
            subsets_of.setdefault(prediction.benchmark, {}).setdefault(prediction.subset, Score()).add(prediction)
        for group, name in (("benchmark", prediction.benchmark), ("element", prediction.element)):
            if name:
                scores[group].setdefault(name, Score()).add(prediction)
    for benchmark, subsets in subsets_of.items():
        for name, score in subsets.items():
            scores["subset"][f"{benchmark}/{name}" if len(benchmarks) > 1 and benchmark else name] = score
    result: dict[str, dict[str, Any]] = {
        group: {name: score.summary() for name, score in sorted(members.items())} for group, members in scores.items()
    }
    for name, summary in result["benchmark"].items():
        means = [score.summary()["accuracy"] for score in subsets_of.get(name, {}).values()]
        known = [mean for mean in means if mean is not None]
        summary["macro"] = sum(known) / len(known) if known and len(known) == len(means) else None
    return result


def to_row(prediction: Prediction) -> dict[str, Any]:
    """A prediction as JSON takes it."""
    return asdict(prediction)
