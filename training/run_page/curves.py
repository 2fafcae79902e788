"""Curves of a page: metrics of a run's rows by name, thinned where a run has more points than a screen."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from training.tracking.metrics import METRICS

MAX_POINTS = 4000
"""Of one curve. More are thinned to the least and the greatest value of each stretch: what stands out stays."""
_HIDDEN = ("loss",)
"""Charts that another one stands for, where a run has it: cross-entropy is the loss without the distillation term."""
_RARE = "eval_"
"""Beginning of metrics that only some steps have: points, not smoothed."""


@dataclass(frozen=True)
class Chart:
    """One metric over steps, a curve for each run. is_first: shown at once, others behind a line to click."""

    name: str
    words: str
    is_rare: bool
    is_first: bool


def curves_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """metric -> steps and values, of the rows that have a finite one."""
    curves: dict[str, tuple[list[int], list[float]]] = {}
    for row in rows:
        for name, value in row.items():
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if name != "step" and is_number and math.isfinite(value):
                steps, values = curves.setdefault(name, ([], []))
                steps.append(row["step"])
                values.append(value)
    return {name: _as_curve(*_thinned(steps, values)) for name, (steps, values) in curves.items()}


def _as_curve(steps: list[int], values: list[float]) -> dict[str, list[float]]:
    return {"steps": list(steps), "values": [float(f"{value:.6g}") for value in values]}


def _thinned(steps: list[int], values: list[float]) -> tuple[list[int], list[float]]:
    if len(steps) <= MAX_POINTS:
        return steps, values
    chosen = {0, len(steps) - 1}
    length = -(-len(steps) // ((MAX_POINTS - 2) // 2))
    for start in range(0, len(steps), length):
        stretch = range(start, min(start + length, len(steps)))
        chosen |= {min(stretch, key=values.__getitem__), max(stretch, key=values.__getitem__)}
    kept = sorted(chosen)
    return [steps[i] for i in kept], [values[i] for i in kept]


def charts_of(runs: Iterable[Mapping[str, Mapping[str, Sequence[float]]]]) -> tuple[list[dict[str, Any]], list[str]]:
    """Charts for the metrics of these runs' curves, losses and accuracies before the order of METRICS; behind them what
    is not in METRICS, and what is 0 throughout, of parts that no run uses. And what nobody recorded, in words.
    """
    runs = list(runs)
    found = {name for curves in runs for name in curves}
    hidden = {name for name in _HIDDEN if name in found and "ce" in found}
    used = {name for curves in runs for name, curve in curves.items() if any(curve["values"])}
    hidden |= {name for name in found - used if not name.startswith(_RARE)}
    known = [metric for metric in METRICS if metric.name in found - hidden]
    known.sort(key=lambda metric: (metric.name not in ("loss", "ce"), not metric.name.startswith(_RARE)))
    charts = [Chart(metric.name, metric.words, metric.name.startswith(_RARE), is_first=True) for metric in known]
    rest = sorted(found - {metric.name for metric in METRICS} | hidden)
    words = {metric.name: metric.words for metric in METRICS}
    charts += [
        Chart(name, words.get(name, name.replace("_", " ")), name.startswith(_RARE), is_first=False) for name in rest
    ]
    return [asdict(chart) for chart in charts], [metric.words for metric in METRICS if metric.name not in found]
