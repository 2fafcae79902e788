"""Many questions about one screenshot in a step: shared prefixes beside samples apart, and beside Hugging Face code.

    python -m benchmarks.share                       # toy shape on this machine
    python -m benchmarks.share --shapes 2b --device cuda --megapixels 3.5

A step is one pack of 1 to 16 questions about one screenshot, from files to new weights. Full and PixelPrune run with
every sample for itself (`data.share_prefix=off`) and with the screenshot once (`step`); stock is the same model,
weights and records through transformers alone, one by one (`benchmarks.parts.stock`). All ways take turns in one
process, without recomputation and without loader processes; the first round is warm-up. Ratios are medians over the
rounds of one step beside another of the same round; CPU seconds stand beside the wall clock, for machines that do
other work. Before anything is measured, loss and gradient of a shared step are held to those of the samples apart.

FLOPs say nothing of decoding, the optimizer and whatever else a step does as often however many questions share it. So
forward and backward are timed for themselves too, and one step of each way with the most questions is taken apart.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.exact_screens import write_exact_screens
from benchmarks.parts.one_rank import only_rank
from benchmarks.parts.record import markdown_table, write_record
from benchmarks.parts.shapes import SHAPES
from benchmarks.parts.step_meter import PhaseMeter
from benchmarks.parts.step_profile import PARTS, profile_step
from benchmarks.parts.step_ways import Bench, Way
from benchmarks.parts.stock import StockTrainer
from benchmarks.step_stock import Measured, measured, read_records
from training.data.loader import MicroBatch
from training.distributed.ranks import leave_ranks
from training.loop.step import run_step

MODES = ("Full", "PixelPrune")
SHARING = {"": "off", ", shared": "step"}
STOCK = "stock, one by one"
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}
ELEMENTS = ("Save", "the search field at the top", "Help", "the second entry of the list, left of its date", "Close")


def write_questions(folder: Path, num_screens: int, num_questions: int, megapixels: float, retain: float) -> Path:
    """`num_questions` records of each screenshot behind each other, their questions of uneven length."""
    originals = write_exact_screens(folder, num_screens, megapixels, retain).read_text().splitlines()
    path = folder / f"questions_{num_questions}.jsonl"
    with path.open("w") as file:
        for line in originals:
            for number in range(num_questions):
                record = json.loads(line)
                text = f"Click {ELEMENTS[number % len(ELEMENTS)]}, number {number}."
                record["messages"][0]["content"][1]["text"] = text
                file.write(json.dumps(record) + "\n")
    return path


def ways_of(bench: Bench, num: int, num_steps: int) -> dict[str, Way]:
    """Full and PixelPrune, apart and shared, with the same `num` questions in each step."""
    return {
        mode + suffix: bench.way(
            mode, f"data.share_prefix={share}", "data.shuffle=false", pack_samples=num, packs=1, num_steps=num_steps
        )
        for mode in MODES
        for suffix, share in SHARING.items()
    }


def our_step(bench: Bench, way: Way, seen: list[MicroBatch], spent: dict[str, float] | None = None) -> float:
    """The next optimizer step of a way; `seen` becomes its packs, `spent` its seconds by phase."""
    bench.prepare(way)
    seen.clear()

    def noted(batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
        for batch in batches:
            seen.append(batch)
            yield batch

    meter = PhaseMeter(bench.ranks)
    run_step(bench.engine, noted(next(way.steps)[1]), meter)
    phases = meter.finish_phases()
    if spent is not None:
        spent |= phases
    return meter.loss


def measure(bench: Bench, stock: StockTrainer | None, num: int, rounds: int) -> dict[str, list[Measured]]:
    """Steps of every way with `num` questions about one screenshot, by round; the first round is left out."""
    by_id = read_records(bench.records)
    ways = ways_of(bench, num, rounds + 1)
    device, found, seen = bench.ranks.device, dict[str, list[Measured]](), list[MicroBatch]()
    for number in range(rounds + 1):
        row, same = {}, list[dict[str, Any]]()
        for name, way in ways.items():
            spent: dict[str, float] = {}
            row[name] = measured(partial(our_step, bench, way, seen, spent), device)
            row[name] |= {"flops": seen[0].flops, "tokens": seen[0].pack.num_tokens}
            row[name]["model_s"] = spent["forward"] + spent["backward"]
            same = [by_id[record] for record in seen[0].record_ids]
        if stock is not None:
            row[STOCK] = measured(partial(stock.step, same, bench.records.parent, padded=False), device)
            row[STOCK] |= {what: row["Full"][what] for what in ("flops", "tokens")}
        for name, one in row.items():
            if number:
                found.setdefault(name, []).append(one)
    return found


def parts_of(bench: Bench, num: int) -> dict[str, dict[str, float]]:
    """Seconds of one step of each way by part of the model (`benchmarks.parts.step_profile`); the second of two."""
    found = {}
    for name, way in ways_of(bench, num, 2).items():
        for _ in range(2):
            found[name] = profile_step(bench.module, partial(our_step, bench, way, []))
    return found


def check_equal_work(bench: Bench, num: int) -> dict[str, float]:
    """Relative differences of loss and gradient, shared to apart. Raises SystemExit where they are no rounding."""
    losses, gradients = [], []
    for way in list(ways_of(bench, num, 1).values())[-2:]:
        bench.prepare(way)
        (batch,) = next(way.steps)[1]
        total = bench.module(batch.pack.to(bench.ranks.device)).total
        parameters = [p for p in bench.module.parameters() if p.requires_grad]
        gradients.append([g.detach() for g in torch.autograd.grad(total, parameters)])
        losses.append(float(total.detach()))
    pairs = zip(*gradients, strict=True)
    difference = sum(float((a.float() - b.float()).square().sum()) for a, b in pairs)
    whole = sum(float(a.float().square().sum()) for a in gradients[0])
    found = {"loss": abs(losses[1] - losses[0]) / abs(losses[0]), "gradient": (difference / whole) ** 0.5}
    if max(found.values()) > TOLERANCE[bench.config.model.dtype]:
        raise SystemExit(f"a shared step is not the work of the same samples apart: {found}")
    return found


def summarise(num: int, found: dict[str, list[Measured]]) -> list[dict[str, Any]]:
    """A row for each way; beside it the way's gain over itself apart and over stock, and what the FLOPs allow."""

    def middle(name: str, what: str) -> float:
        return statistics.median(one[what] for one in found[name])

    def gain(over: str, name: str, clock: str) -> float:
        return statistics.median(a[clock] / b[clock] for a, b in zip(found[over], found[name], strict=True))

    rows = []
    for name, steps in found.items():
        apart = name.removesuffix(", shared")
        row = {"questions": num, "way": name, "flops_ratio": middle(apart, "flops") / middle(name, "flops")}
        row |= {what: middle(name, what) for what in ("wall_s", "cpu_s", "added_bytes", "flops", "tokens")}
        row["parts_over_apart"] = gain(apart, name, "model_s") if name != STOCK else None
        for clock in ("wall_s", "cpu_s"):
            row[f"over_apart_{clock}"] = gain(apart, name, clock)
            row[f"over_stock_{clock}"] = gain(STOCK, name, clock) if STOCK in found else None
        rows.append(row | {"steps": steps})
    return rows


def table_of(rows: list[dict[str, Any]]) -> str:
    """All ways: what a step computes and takes."""

    def over_stock(row: dict[str, Any]) -> dict[str, str]:
        if row["over_stock_cpu_s"] is None:
            return {}
        return {"over stock (CPU time)": f"{row['over_stock_wall_s']:.2f}x ({row['over_stock_cpu_s']:.2f}x)"}

    return markdown_table(
        [
            {
                "questions": row["questions"],
                "way": row["way"],
                "tokens": f"{row['tokens']:,.0f}",
                "step ms": f"{1000 * row['wall_s']:.0f}",
                "CPU ms": f"{1000 * row['cpu_s']:.0f}",
                "memory of the step MB": f"{row['added_bytes'] / 1e6:.0f}",
            }
            | over_stock(row)
            for row in rows
        ]
    )


def gain_table(rows: list[dict[str, Any]]) -> str:
    """Shared beside apart: CPU time of whole steps and of forward and backward, and the share of what FLOPs allow."""

    def beside(gain: float, row: dict[str, Any]) -> str:
        return f"{gain:.2f}x ({gain / row['flops_ratio']:.2f})"

    return markdown_table(
        [
            {
                "questions": row["questions"],
                "way": row["way"],
                "FLOPs ratio": f"{row['flops_ratio']:.2f}x",
                "forward and backward over apart (of the FLOPs ratio)": beside(row["parts_over_apart"], row),
                "whole step over apart (of the FLOPs ratio)": beside(row["over_apart_cpu_s"], row),
                "wall clock": f"{row['over_apart_wall_s']:.2f}x",
            }
            for row in rows
            if row["way"].endswith("shared")
        ]
    )


def parts_table(found: dict[str, dict[str, float]]) -> str:
    return markdown_table(
        [{"part": part} | {name: f"{1000 * seconds[part]:.0f} ms" for name, seconds in found.items()} for part in PARTS]
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="toy", choices=SHAPES, help="random weights of this size")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--questions", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="about one screenshot")
    parser.add_argument("--retain", type=float, default=0.4, help="share of kept blocks")
    parser.add_argument("--megapixels", type=float, default=0.3, help="size of the screenshots")
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds")
    parser.add_argument("--no-stock", action="store_true", help="shared beside apart alone")
    parser.add_argument("--threads", type=int, default=1, help="torch threads on a cpu")
    parser.add_argument("--folder", type=Path, default=Path("runs/share"))
    parser.add_argument("--name", help="name of the record under benchmarks/results")
    parser.add_argument("--no-record", action="store_true")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    ranks = only_rank("benchmarks.share", arguments.device, arguments.threads)
    folder = arguments.folder / arguments.shapes
    shutil.rmtree(folder, ignore_errors=True)
    files = {
        num: write_questions(folder / "data", arguments.rounds + 1, num, arguments.megapixels, arguments.retain)
        for num in arguments.questions
    }
    settings = [
        f"model.dtype={'bfloat16' if arguments.device == 'cuda' else 'float32'}", "model.attention=sdpa",
        "model.recompute_vit=0", "model.recompute_llm=0", "data.num_workers=0",
        f"distributed.threads_per_rank={arguments.threads}",
    ]  # fmt: skip
    bench = Bench(arguments.shapes, folder, settings, ranks, files[arguments.questions[-1]])
    differences = check_equal_work(bench, arguments.questions[-1])
    stock = None
    if not arguments.no_stock:
        stock = StockTrainer(
            bench.model, bench.files.tokenizer, bench.config.resize, attention="sdpa", lr=bench.config.optim.lr
        )
    rows = []
    for num in arguments.questions:
        bench.records = files[num]
        rows += summarise(num, measure(bench, stock, num, arguments.rounds))
    parts = parts_of(bench, arguments.questions[-1])
    loads = ", ".join(f"{load:.1f}" for load in os.getloadavg())
    sentence = (
        f"Shape {arguments.shapes} (random weights, {bench.config.model.dtype}), one screenshot of "
        f"{arguments.megapixels:g} megapixels in a step, {arguments.retain:.0%} kept by PixelPrune. Attention: sdpa. "
        f"No recomputation, no loader processes, {arguments.rounds} rounds; ratios are medians over rounds. Shared "
        f"against apart before training, {arguments.questions[-1]} questions: loss {differences['loss']:.1e}, gradient "
        f"{differences['gradient']:.1e}, relative. Load averages at the end: {loads}; where they are above the cores, "
        "read the CPU time."
    )
    table = (
        f"Shared over apart, by CPU time:\n\n{gain_table(rows)}\n\n{table_of(rows)}\n\nWhere a step of "
        f"{arguments.questions[-1]} questions goes, under the profiler, which adds its own time:\n\n"
        + parts_table(parts)
    )
    print(sentence + "\n\n" + table)
    if not arguments.no_record:
        options = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}
        payload = {
            "settings": options,
            "differences": differences,
            "load_average": os.getloadavg(),
            "rows": rows,
            "parts": parts,
        }
        name = arguments.name or f"share_{arguments.shapes}_{arguments.device}"
        write_record(name, payload, sentence + "\n\n" + table)
    leave_ranks()


if __name__ == "__main__":
    main()
