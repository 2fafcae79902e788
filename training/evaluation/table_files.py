"""A finished table on disk: Markdown in the paper's shape, JSON with everything, a plot."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from pixelprune.files import write_whole
from training.evaluation.table_plans import TablePlan

FLOPS = ("prefill_flops", "prefill_flops_square")


@dataclass(frozen=True)
class Cell:
    """One row on one benchmark. score: as published, the macro mean over subsets where there are several, else the mean
    over records, which `micro` is in any case; both 0 to 1, None where the benchmark brings its own scorer.
    retain_ratio: kept blocks of all images over blocks of all images.
    prefill_flops, prefill_flops_square: sums over all records in both conventions
    (`training.evaluation.scoring.Prediction`), None where an answer failed."""

    score: float | None
    micro: float | None
    retain_ratio: float | None
    num: int
    num_failed: int
    prefill_flops: float | None = None
    prefill_flops_square: float | None = None


def cells_of(result: Mapping[str, Any], name: str) -> dict[str, Cell]:
    """Benchmark -> cell, from a pass's result. Records that name no benchmark count under `name`."""
    groups = result["benchmark"] or {name: result["overall"]["all"] | {"macro": None}}
    return {
        benchmark: Cell(
            summary["macro"] if summary["macro"] is not None else summary["accuracy"],
            summary["accuracy"],
            summary["retain_ratio"],
            summary["num"],
            summary["num_failed"],
            summary.get("prefill_flops"),
            summary.get("prefill_flops_square"),
        )
        for benchmark, summary in groups.items()
    }


def mean_score(cells: Sequence[Cell]) -> float | None:
    """The macro mean over benchmarks; None where one of them has no score."""
    scores = [cell.score for cell in cells if cell.score is not None]
    return sum(scores) / len(scores) if scores and len(scores) == len(cells) else None


def markdown(plan: TablePlan, grid: Mapping[str, Mapping[str, Cell]]) -> str:
    """Row label -> benchmark -> cell as a table: scores in percent with the retain ratio beside, Avg last."""
    benchmarks = list(dict.fromkeys(benchmark for row in grid.values() for benchmark in row))
    heads = [*benchmarks, "Avg", *(["FLOPs"] if plan.shows_flops else [])]
    note = f"Table {plan.number}: {plan.title}. Score in % (kept blocks in %)."
    if plan.shows_flops:
        note += " FLOPs of the prompt in % of Full, causal attention counted by half (as the whole square)."
    lines = [note, "", "| | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(heads)]
    for label, row in grid.items():
        shown = [_shown(row[name]) if name in row else "" for name in benchmarks]
        is_whole = len(row) == len(benchmarks)
        average = mean_score(list(row.values())) if is_whole else None
        shown.append(_percent(average))
        if plan.shows_flops:
            ratios = [flops_ratio(row, grid.get("Full", {}), name) for name in FLOPS]
            shown.append(f"{_percent(ratios[0])} ({_percent(ratios[1])})")
        lines.append(f"| {label} | " + " | ".join(shown) + " |")
    failed = sum(cell.num_failed for row in grid.values() for cell in row.values())
    if failed:
        lines += ["", f"{failed} answers failed and count as misses."]
    return "\n".join(lines) + "\n"


def flops_ratio(row: Mapping[str, Cell], full: Mapping[str, Cell], name: str) -> float | None:
    """FLOPs of a row over those of Full on the same benchmarks; None where one of the sums is not known."""
    own, whole = ([getattr(cell, name) for cell in cells.values()] for cells in (row, full))
    if row.keys() != full.keys() or not row or None in [*own, *whole]:
        return None
    return float(sum(own) / sum(whole))


def _shown(cell: Cell) -> str:
    return f"{_percent(cell.score)} ({_percent(cell.retain_ratio)})"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def write_table(folder: Path, name: str, plan: TablePlan, grid: Mapping[str, Mapping[str, Cell]]) -> str:
    """Write NAME.md, NAME.json and NAME.png; returns the Markdown."""
    text = markdown(plan, grid)
    write_whole(folder / f"{name}.md", text.encode())
    rows = {
        label: {
            "avg": mean_score(list(row.values())),
            **{f"{name}_ratio": flops_ratio(row, grid.get("Full", {}), name) for name in FLOPS},
            "cells": {key: vars(cell) for key, cell in row.items()},
        }
        for label, row in grid.items()
    }
    content = {"table": plan.number, "title": plan.title, "rows": rows}
    write_whole(folder / f"{name}.json", (json.dumps(content, indent=2) + "\n").encode())
    draw(folder / f"{name}.png", plan, grid)
    return text


def draw(path: Path, plan: TablePlan, grid: Mapping[str, Mapping[str, Cell]]) -> None:
    """Score over retain ratio, one line of points per benchmark, each point a row."""
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for benchmark in dict.fromkeys(benchmark for row in grid.values() for benchmark in row):
        points = [
            (cell.retain_ratio, cell.score, label)
            for label, row in grid.items()
            if (cell := row.get(benchmark)) and cell.score is not None and cell.retain_ratio is not None
        ]
        axes.scatter([x for x, _, _ in points], [y for _, y, _ in points], label=benchmark)
        for x, y, label in points:
            axes.annotate(label, (x, y), fontsize=7, xytext=(3, 3), textcoords="offset points")
    axes.set(xlabel="kept blocks / blocks", ylabel="score", title=f"Table {plan.number}: {plan.title}")
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
