"""Where people see a number of metrics.jsonl: one row for each, read by the terminal, the report and the model card.

A new number is computed where its kind is (a step's in meter.py, held-out ones in loop/held_out_loss.py or
evaluation/during_training.py) and written to metrics.jsonl and wandb as it is; a row here shows it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

Summary = Callable[[Sequence[float]], float | None]
"""Of a run's values; None where they do not have one."""


@dataclass(frozen=True)
class Metric:
    """name: its key in metrics.jsonl; words: what a picture's axis and the model card call it.

    live: how the line of a step or an evaluation says it. summary: rows of the report's table, and what each makes of a
    run's values. picture: the report's picture with a panel for it. in_card: the newest value goes into the model card.
    """

    name: str
    words: str
    live: str = ""
    summary: Mapping[str, Summary] = field(default_factory=dict)
    picture: str = ""
    in_card: bool = False


def _first(values: Sequence[float]) -> float:
    return values[0]


def _last(values: Sequence[float]) -> float:
    return values[-1]


def _first_of_several(values: Sequence[float]) -> float | None:
    """One evaluation says how a run ended, and nothing of how it began."""
    return values[0] if len(values) > 1 else None


_median = statistics.median_high  # a value that was measured

_HOST_MEMORY = "host memory of the first rank, GB"
_DEVICE_MEMORY = "peak memory of the first rank, GB"

METRICS = (
    Metric("loss", "training loss per token", "loss {:.4f}", {"first loss": _first, "last loss": _last}),
    Metric("ce", "training cross-entropy per token", in_card=True),
    Metric("samples_per_s", "samples/s", "{:.1f} samples/s", {"samples/s": _median}, "speed"),
    Metric("kept_tokens_per_s", "kept tokens/s", "{:,.0f} kept tok/s", {"kept tokens/s": _median}, "speed"),
    Metric("mfu", "MFU on kept tokens", picture="speed"),
    Metric("retain_ratio", "retain ratio", "retain {:.1%}", {"retain ratio": _last}),
    Metric("shared_prefix", "share of kept tokens that shared prefixes save"),
    Metric("shared_vision", "share of kept blocks that are not encoded again"),
    Metric("step_s", "seconds of a step", summary={"step s": _median}),
    Metric("data_wait_share", "share of the step that waits for data", summary={"data wait share": _median}),
    Metric("generate_share", "share of the step in which the student writes its own answers"),
    Metric("on_policy_share", "share of samples that the student answers itself"),
    Metric("on_policy_tokens", "tokens of an answer of the student"),
    Metric("peak_memory_gb", _DEVICE_MEMORY, summary={"peak memory GB": max}, picture="memory"),
    Metric("host_memory_gb", _HOST_MEMORY, picture="memory"),
    Metric(
        "eval_loss", "held-out cross-entropy per token", "held-out loss {:.4f}",
        {"first held-out loss": _first_of_several, "last held-out loss": _last}, in_card=True,
    ),
    Metric(
        "eval_token_accuracy", "held-out token accuracy", summary={"last held-out token accuracy": _last}, in_card=True
    ),
    Metric(
        "eval_accuracy", "grounding accuracy", "accuracy {:.4f}",
        {"first grounding accuracy": _first_of_several, "last grounding accuracy": _last}, in_card=True,
    ),
    Metric(
        "eval_accuracy_full", "grounding accuracy on all tokens", "on all tokens {:.4f}",
        {"last grounding accuracy on all tokens": _last}, in_card=True,
    ),
)  # fmt: skip
"""In the order in which they are shown."""

PICTURES = tuple(dict.fromkeys(metric.picture for metric in METRICS if metric.picture))


def live_line(metrics: Mapping[str, float]) -> str:
    """What a step's or an evaluation's line says of these metrics."""
    said = (metric.live.format(metrics[metric.name]) for metric in METRICS if metric.live and metric.name in metrics)
    return "  ".join(said)


def values_of(name: str, rows: Sequence[Mapping[str, float | None]]) -> list[float]:
    """The values of a metric in rows of metrics.jsonl; null (not finite) ones are left out."""
    return [value for row in rows if (value := row.get(name)) is not None]
