"""Is Full behind PixelPrune in `benchmarks.convergence`, or only its learning rate? Rates tuned for each, three seeds.

    python -m benchmarks.convergence_lr [--seeds 3] [--folder runs/convergence_lr]

The same screens, model and loop as `benchmarks.convergence`, which trains both modes at one rate and one seed. Here
each mode tries the same rates, on the first seed, and takes the one that is best on validation screens; the other seeds
train at that rate. What is shown is accuracy on held-out screens that nothing was chosen by. A cell (one mode, rate
and seed) takes about 4 minutes of one core at the default size; those that are done are not done again.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.convergence import PRUNES, Settings, best_constant, fit, write_data_and_start
from benchmarks.parts.record import RESULTS, markdown_table, write_record

LRS = (5e-4, 1e-3, 3e-3)
Cell = dict
"""What `fit` returns, with the seconds of CPU time that it took."""


class Cells:
    """Trainings, a file each."""

    def __init__(self, folder: Path, settings: Settings):
        self.folder, self.settings = folder, settings
        folder.mkdir(parents=True, exist_ok=True)
        path, said = folder / "settings.json", json.dumps(dataclasses.asdict(settings))
        if path.exists() and path.read_text() != said:
            raise SystemExit(f"{folder} holds cells made with other settings: {path}; give another --folder")
        path.write_text(said)

    def data(self, seed: int) -> Path:
        """Screens and the initial model of that seed."""
        folder = self.folder / f"seed-{seed}"
        if not (folder / "written").exists():
            write_data_and_start(folder, dataclasses.replace(self.settings, seed=seed))
            (folder / "written").touch()
        return folder

    def cell(self, trained: str, lr: float, seed: int) -> Cell:
        path = self.folder / f"{trained}-{lr:g}-{seed}.json"
        if not path.exists():
            started = time.process_time()
            found = fit(self.data(seed), trained, dataclasses.replace(self.settings, lr=lr, seed=seed))
            path.write_text(json.dumps(found | {"cpu_seconds": time.process_time() - started}))
        return json.loads(path.read_text())  # type: ignore[no-any-return]


def measure(cells: Cells, seeds: Sequence[int], lrs: Sequence[float]) -> dict[str, dict[float, dict[int, Cell]]]:
    """Mode -> rate -> seed -> cell: all rates for the first seed, the best of them for the others."""
    found = {mode: {lr: {seeds[0]: cells.cell(mode, lr, seeds[0])} for lr in lrs} for mode in PRUNES}
    for seed in seeds[1:]:
        for mode in PRUNES:
            lr = best_lr(found[mode], mode)
            found[mode][lr][seed] = cells.cell(mode, lr, seed)
    return found


def best_lr(by_lr: dict[float, dict[int, Cell]], mode: str) -> float:
    """The rate whose first seed answers most validation screens."""
    return max(by_lr, key=lambda lr: next(iter(by_lr[lr].values()))["validation_accuracy"][f"{mode} -> {mode}"])


def held_out(cell: Cell, mode: str) -> float:
    return float(cell["evaluations"][-1][f"{mode} -> {mode}"])


def tables(found: dict[str, dict[float, dict[int, Cell]]]) -> str:
    """Every rate of the first seed; every seed at the best rate."""
    tried = [
        {
            "mode": f"{mode} -> {mode}",
            "learning rate": f"{lr:g}",
            "validation": f"{next(iter(cells.values()))['validation_accuracy'][f'{mode} -> {mode}']:.1%}",
            "held-out": f"{held_out(next(iter(cells.values())), mode):.1%}",
        }
        for mode, by_lr in found.items()
        for lr, cells in by_lr.items()
    ]
    best = []
    for mode, by_lr in found.items():
        lr = best_lr(by_lr, mode)
        values = [held_out(cell, mode) for cell in by_lr[lr].values()]
        spread = f" ± {statistics.stdev(values):.1%}" if len(values) > 1 else ""
        best.append(
            {
                "mode": f"{mode} -> {mode}",
                "learning rate": f"{lr:g}",
                "held-out": f"{statistics.mean(values):.1%}{spread}",
                "every seed": ", ".join(f"{value:.1%}" for value in values),
                "CPU seconds of a run": f"{statistics.median(cell['cpu_seconds'] for cell in by_lr[lr].values()):.0f}",
            }
        )
    return f"First seed, every rate:\n\n{markdown_table(tried)}\n\nAt the best rate:\n\n{markdown_table(best)}"


def plot(found: dict[str, dict[float, dict[int, Cell]]], path: Path) -> None:
    """Held-out accuracy over steps: the rates of the first seed on the left, all seeds at the best on the right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), dpi=130, sharey=True)
    for number, (mode, by_lr) in enumerate(found.items()):
        best = best_lr(by_lr, mode)
        for style, (lr, cells) in zip(("o:", "o--", "o-", "s-"), by_lr.items(), strict=False):
            drawn = next(iter(cells.values()))["evaluations"]
            points = [row["step"] for row in drawn], [100 * row[f"{mode} -> {mode}"] for row in drawn]
            left.plot(*points, style, color=f"C{number}", markersize=3, label=f"{mode}, {lr:g}")
        for seed, cell in by_lr[best].items():
            drawn = cell["evaluations"]
            points = [row["step"] for row in drawn], [100 * row[f"{mode} -> {mode}"] for row in drawn]
            label = f"{mode}, {best:g}" if seed == next(iter(by_lr[best])) else None
            right.plot(*points, "o-", color=f"C{number}", markersize=3, alpha=0.7, label=label)
    left.set(xlabel="optimizer step", ylabel="held-out click accuracy (%)", ylim=(0, 100), title="every rate, one seed")
    right.set(xlabel="optimizer step", title="best rate, every seed")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lrs", nargs="+", type=float, default=LRS, metavar="LR")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--every", type=int, default=150, help="steps between two evaluations")
    parser.add_argument("--pages", type=int, default=2000, help="training screens")
    parser.add_argument("--held-out-pages", type=int, default=100, help="screens answered, of each kind")
    parser.add_argument("--folder", type=Path, default=Path("runs/convergence_lr"))
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the record and the plot")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    settings = Settings(
        num_pages=args.pages,
        num_held_out_pages=args.held_out_pages,
        num_steps=args.steps,
        every=args.every,
        samples_per_pack=16,
    )
    cells = Cells(args.folder, settings)
    found = measure(cells, range(args.seeds), args.lrs)
    constant = best_constant(cells.data(0) / "held_out.jsonl")
    text = (
        f"{settings.num_pages} drawn screens a seed, {settings.num_steps} steps of {settings.samples_per_step} "
        f"records. Best constant answer: {constant:.1%}.\n\n{tables(found)}"
    )
    print(text)
    runs = {
        f"{mode}, {lr:g}, seed {seed}": {key: value for key, value in cell.items() if key != "steps"}
        for mode, by_lr in found.items()
        for lr, of_lr in by_lr.items()
        for seed, cell in of_lr.items()
    }
    write_record("convergence_lr", {"settings": dataclasses.asdict(settings), "runs": runs}, text, args.out)
    plot(found, args.out / "convergence_lr.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
