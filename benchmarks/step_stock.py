"""A whole training step beside plain Hugging Face code, Full and pruned, for 1 to 8 screenshots in a step.

    python -m benchmarks.step_stock                       # toy shape on this machine
    python -m benchmarks.step_stock --shapes 2b --device cuda --megapixels 3.5

Everything between the files and the new weights counts: decode, resize, tokenise, forward, backward, clipping, AdamW.
Stock is the same model, weights and records through transformers alone, in its two usual forms: samples one by one and
one padded batch (`benchmarks.parts.stock`). All four ways take turns in one process, without recomputation and without
loader processes; the first round is warm-up. Ratios are medians over the rounds of one step beside another of the same
round. Machines that do other work at the time blur the wall clock: CPU seconds of the process stand beside it.
The loss of the first step is that of stock within rounding, or the benchmark ends: both do the same work.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.exact_screens import write_exact_screens
from benchmarks.parts.one_rank import only_rank
from benchmarks.parts.record import markdown_table, write_record
from benchmarks.parts.shapes import SHAPES
from benchmarks.parts.step_meter import DeviceMeter, peak_bytes, reset_peak
from benchmarks.parts.step_ways import Bench, Way
from benchmarks.parts.stock import StockTrainer
from pixelprune.flops import CostModel
from training.distributed.ranks import leave_ranks
from training.loop.step import run_step

STOCK = {"stock, one by one": False, "stock, padded": True}
OURS = ("Full", "PixelPrune")
LOSS_TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}

Measured = dict[str, float]


def measured(step: Callable[[], float], device: torch.device) -> Measured:
    """Wall and CPU seconds of a step, its loss, and the bytes it took on top of what was held."""
    reset_peak(device)
    held = peak_bytes(device) or 0
    wall, cpu = time.perf_counter(), time.process_time()
    loss = step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
    return seconds | {"loss": loss, "added_bytes": (peak_bytes(device) or 0) - held}


def our_step(bench: Bench, way: Way, seen: list[str]) -> float:
    """The next optimizer step of a way; `seen` becomes the ids of its records."""
    bench.prepare(way)
    _, batches = next(way.steps)
    meter = DeviceMeter(bench.ranks)
    outcome = run_step(bench.engine, batches, meter)
    seen[:] = [record for ids, _ in outcome.packs for record in ids]
    return float(meter.finish_step()[1]["loss"])


def measure(bench: Bench, stock: StockTrainer, records: Path, num: int, rounds: int) -> dict[str, list[Measured]]:
    """Steps of every way with `num` screenshots each, by round; the first round is left out."""
    by_id = read_records(records)
    ways = {name: bench.way(name, pack_samples=num, packs=1, num_steps=rounds + 2) for name in OURS}
    device, found, seen = bench.ranks.device, dict[str, list[Measured]](), list[str]()
    for number in range(rounds + 1):
        row = {"Full": measured(partial(our_step, bench, ways["Full"], seen), device)}
        same = [by_id[record] for record in seen]
        for name, padded in STOCK.items():
            row[name] = measured(partial(stock.step, same, records.parent, padded=padded), device)
        row["PixelPrune"] = measured(partial(our_step, bench, ways["PixelPrune"], []), device)
        for name, one in row.items():
            if number:
                found.setdefault(name, []).append(one)
    return found


def read_records(path: Path) -> dict[str, dict[str, Any]]:
    """Records by the ids that the index gives them: source and number."""
    lines = path.read_text().splitlines()
    return {f"{path.stem}:{number}": json.loads(line) for number, line in enumerate(lines)}


def check_equal_work(bench: Bench, stock: StockTrainer, records: Path) -> tuple[float, float]:
    """The losses of the first record before any training. Raises SystemExit where stock's is another one."""
    way = bench.way("Full", pack_samples=1, packs=1, num_steps=1)
    _, batches = next(way.steps)
    (batch,) = batches
    bench.prepare(way)
    sample = stock.tokens(read_records(records)[batch.record_ids[0]], records.parent)
    with torch.no_grad():
        ours = float(bench.module(batch.pack.to(bench.ranks.device)).total) / batch.pack.num_supervised
        theirs = float(stock.model(**stock.inputs([sample])).loss)
    if not math.isclose(ours, theirs, rel_tol=LOSS_TOLERANCE[bench.config.model.dtype]):
        raise SystemExit(f"stock and Full are not the same work: losses {theirs} and {ours}")
    return ours, theirs


def summarise(num: int, found: dict[str, list[Measured]], ratios: dict[str, float]) -> list[dict[str, Any]]:
    """A row for each way. Beside each time stands the ratio of the faster stock way to it, by wall and by CPU clock."""

    def middle(name: str, what: str) -> float:
        return statistics.median(one[what] for one in found[name])

    best = {clock: min(STOCK, key=lambda name: middle(name, clock)) for clock in ("wall_s", "cpu_s")}
    rows = []
    for name, steps in found.items():
        against = {
            clock: [a[clock] / b[clock] for a, b in zip(found[best[clock]], steps, strict=True)] for clock in best
        }
        rows.append(
            {
                "samples": num,
                "way": name,
                **{what: middle(name, what) for what in ("wall_s", "cpu_s", "added_bytes")},
                **{f"speed_up_{clock}": statistics.median(values) for clock, values in against.items()},
                "speed_up_by_round": against,
                "steps": steps,
                **(ratios if name == "PixelPrune" else {}),
            }
        )
    return rows


def flops_ratios(bench: Bench, num: int) -> dict[str, float]:
    """Full to PixelPrune over all records, in both conventions."""
    found = {}
    for label, cost in (("triangle", bench.cost), ("whole_square", bench.cost.whole_square())):
        full, pruned = (_flops(bench, name, cost, num) for name in OURS)
        found[f"flops_ratio_{label}"] = full / pruned
    return found


def _flops(bench: Bench, name: str, cost: CostModel, num: int) -> float:
    index = bench.way(name, pack_samples=num, packs=1, num_steps=1).feed.index
    return float(index.plan_input(cost).cost.sum())


def table_of(rows: list[dict[str, Any]]) -> str:
    return markdown_table(
        [
            {
                "screenshots": row["samples"],
                "way": row["way"],
                "step ms": f"{1000 * row['wall_s']:.0f}",
                "CPU ms": f"{1000 * row['cpu_s']:.0f}",
                "memory of the step MB": f"{row['added_bytes'] / 1e6:.0f}",
                "against stock": f"{row['speed_up_wall_s']:.2f}x",
                "by CPU time": f"{row['speed_up_cpu_s']:.2f}x",
                "FLOPs ratio (whole square, as the paper)": _ratios(row),
            }
            for row in rows
        ]
    )


def _ratios(row: dict[str, Any]) -> str:
    if "flops_ratio_triangle" not in row:
        return "-"
    return f"{row['flops_ratio_triangle']:.2f}x ({row['flops_ratio_whole_square']:.2f}x)"


def describe(arguments: argparse.Namespace, bench: Bench, stock_attention: str) -> str:
    """What was run, in a few sentences above the table."""
    loads = ", ".join(f"{load:.1f}" for load in os.getloadavg())
    return (
        f"Shape {arguments.shapes} (random weights, {bench.config.model.dtype}), screenshots of "
        f"{arguments.megapixels:g} megapixels, {arguments.retain:.0%} kept; a step is one pack. Attention: ours "
        f"{bench.attention}, stock {stock_attention}. No recomputation, no loader processes, {arguments.rounds} "
        "rounds. Against stock: the faster stock way of this size over this way, medians over rounds. Load averages at "
        f"the end: {loads}; where they are above the cores, read the CPU time."
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="toy", choices=SHAPES, help="random weights of this size")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--samples", type=int, nargs="+", default=[1, 2, 4, 8], help="screenshots in a step")
    parser.add_argument("--retain", type=float, default=0.4, help="share of kept blocks")
    parser.add_argument("--megapixels", type=float, default=0.3, help="size of the screenshots")
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds")
    parser.add_argument("--threads", type=int, default=1, help="torch threads on a cpu")
    parser.add_argument("--folder", type=Path, default=Path("runs/step_stock"))
    parser.add_argument("--name", help="name of the record under benchmarks/results")
    parser.add_argument("--no-record", action="store_true")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    ranks = only_rank("benchmarks.step_stock", arguments.device, arguments.threads)
    folder = arguments.folder / arguments.shapes
    shutil.rmtree(folder, ignore_errors=True)
    records = write_exact_screens(folder / "data", 2 * max(arguments.samples), arguments.megapixels, arguments.retain)
    settings = [
        f"model.dtype={'bfloat16' if arguments.device == 'cuda' else 'float32'}",
        "model.recompute_vit=0", "model.recompute_llm=0", "data.num_workers=0",
        f"distributed.threads_per_rank={arguments.threads}",
    ]  # fmt: skip
    bench = Bench(arguments.shapes, folder, settings, ranks, records)
    stock_attention = bench.attention if bench.attention.startswith("flash_attention") else "sdpa"
    stock = StockTrainer(
        bench.model, bench.files.tokenizer, bench.config.resize, attention=stock_attention, lr=bench.config.optim.lr
    )
    losses = check_equal_work(bench, stock, records)
    rows = []
    for num in arguments.samples:
        found = measure(bench, stock, records, num, arguments.rounds)
        rows += summarise(num, found, flops_ratios(bench, num))
    sentence = describe(arguments, bench, stock_attention)
    table = table_of(rows)
    print(sentence + "\n\n" + table)
    if not arguments.no_record:
        options = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}
        payload = {
            "settings": options,
            "attention": {"ours": bench.attention, "stock": stock_attention},
            "losses_before_training": {"ours": losses[0], "stock": losses[1]},
            "load_average": os.getloadavg(),
            "rows": rows,
        }
        name = arguments.name or f"step_stock_{arguments.shapes}_{arguments.device}"
        write_record(name, payload, sentence + "\n\n" + table)
    leave_ranks()


if __name__ == "__main__":
    main()
