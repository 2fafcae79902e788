"""Pictures and a table of the metrics of one or several runs."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.table import Table

from training.errors import need
from training.tracking.metrics import METRICS, PICTURES, values_of
from training.tracking.metrics_file import METRICS_FILE, read_metrics


def plot_convergence(runs: dict[str, list[dict]], path: Path) -> Path:
    """Training loss (thin: every step, thick: running mean) and held-out loss over optimizer steps."""
    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=150)
    for number, (name, rows) in enumerate(runs.items()):
        colour = f"C{number}"
        train = [(row["step"], loss) for row in rows if (loss := _cross_entropy(row)) is not None]
        held_out = [(row["step"], row["eval_loss"]) for row in rows if row.get("eval_loss") is not None]
        if train:
            steps, losses = zip(*train, strict=True)
            axes.plot(steps, losses, color=colour, alpha=0.25, linewidth=0.8)
            axes.plot(steps, _running_mean(losses), color=colour, label=f"{name}: training")
        if held_out:
            steps, losses = zip(*held_out, strict=True)
            axes.plot(steps, losses, "o--", color=colour, markersize=4, label=f"{name}: held-out")
    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("cross-entropy per supervised token (nats)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)
    return path


def plot_metrics(runs: dict[str, list[dict]], picture: str, path: Path) -> Path | None:
    """One panel for each metric of a picture over optimizer steps, a curve per run; None when no run has any."""
    all_rows = [row for rows in runs.values() for row in rows]
    found = [metric for metric in METRICS if metric.picture == picture and any(metric.name in row for row in all_rows)]
    if not found:
        return None
    figure, all_axes = plt.subplots(1, len(found), figsize=(5.5 * len(found), 4), dpi=150, squeeze=False)
    for axes, metric in zip(all_axes[0], found, strict=True):
        for number, (run, rows) in enumerate(runs.items()):
            points = [(row["step"], row[metric.name]) for row in rows if row.get(metric.name) is not None]
            if points:
                steps, values = zip(*points, strict=True)
                axes.plot(steps, values, color=f"C{number}", alpha=0.25, linewidth=0.8)
                axes.plot(steps, _running_mean(values), color=f"C{number}", label=run)
        axes.set_xlabel("optimizer step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel(metric.words)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    all_axes[0][0].legend(frameon=False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)
    return path


def summarise(rows: list[dict]) -> dict[str, float]:
    """The rows of a run's table; speeds are medians over its steps. A skipped step has no loss."""
    train = [row for row in rows if "loss" in row]
    facts: dict[str, float] = {"steps": train[-1]["step"]} if train else {}
    if num_skipped := sum(row["loss"] is None for row in train):
        facts["steps without a loss"] = num_skipped
    for metric in METRICS:
        if values := values_of(metric.name, rows):
            made = {words: make(values) for words, make in metric.summary.items()}
            facts |= {words: value for words, value in made.items() if value is not None}
    return facts


def print_table(runs: dict[str, list[dict]], console: Console) -> None:
    facts = {name: summarise(rows) for name, rows in runs.items()}
    table = Table()
    table.add_column("")
    for name in runs:
        table.add_column(name, justify="right")
    for key in dict.fromkeys(key for run in facts.values() for key in run):
        table.add_row(key, *(f"{run[key]:,.4g}" if key in run else "-" for run in facts.values()))
    if not console.is_terminal:
        # A pipe or a file has no width: rich would take 80 columns and cut what does not fit.
        needed = console.measure(table, options=console.options.update(max_width=10_000)).maximum
        console.width = max(console.width, needed)
    console.print(table)


def report(folders: list[Path], out: Path, console: Console) -> None:
    """A table of these runs on the console, their curves as pictures in `out`. UserError for a folder without metrics.

    folders: of runs (they hold metrics.jsonl).
    """
    runs = {name: read_metrics(folder) for name, folder in named_runs(folders).items()}
    print_table(runs, console)
    pictures = [
        plot_convergence(runs, out / "convergence.png"),
        *(plot_metrics(runs, picture, out / f"{picture}.png") for picture in PICTURES),
    ]
    names = [str(picture) for picture in pictures if picture]
    console.print("pictures:", *names, soft_wrap=True)


def named_runs(folders: list[Path], *, may_have_begun: bool = False) -> dict[str, Path]:
    """Folders of runs by their last parts, as many as tell them apart.

    may_have_begun: a folder without metrics will do, as a run has it before its first step. UserError for others.
    """
    for folder in folders:
        if may_have_begun:
            need(folder.is_dir(), f"{folder}: no such folder; expected the folder of a run")
        else:
            need((folder / METRICS_FILE).exists(), f"{folder}: no {METRICS_FILE}; expected the folder of a run")
    folders = list(dict.fromkeys(folder.resolve() for folder in folders))
    num_parts = 1
    while len(names := {"/".join(folder.parts[-num_parts:]): folder for folder in folders}) < len(folders):
        num_parts += 1
    return names


def _cross_entropy(row: dict) -> float | None:
    """The training loss in nats per token: without the distillation term, which is in `loss`."""
    return row.get("ce", row.get("loss"))


def _running_mean(values: tuple[float, ...]) -> list[float]:
    """Mean over a centred window of a twentieth of the run: smooth, without lagging behind."""
    half = max(1, len(values) // 40)
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]
