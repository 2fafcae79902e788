"""Training steps on windows of five screenshots: Full, pred2d, and both directions of pred3d, side by side.

    python -m benchmarks.session_step                       # toy shape on this machine
    python -m benchmarks.session_step --shapes 2b --device cuda --viewport 1366x768

A step is one record of `data_tools sessions` with its history, from files to new weights; all ways take turns with the
same records in one process, without recomputation and without loader processes; the first round is warm-up. Ratios are
medians over the rounds of one step beside another of the same round, by CPU time on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.parts.one_rank import only_rank
from benchmarks.parts.record import markdown_table, write_record
from benchmarks.parts.shapes import SHAPES
from benchmarks.parts.step_ways import Bench
from benchmarks.parts.walked import SAMPLES
from benchmarks.share import our_step
from benchmarks.step_stock import Measured, measured
from training.data.loader import MicroBatch
from training.distributed.ranks import leave_ranks

WAYS: dict[str, tuple[str, ...]] = {
    "Full": ("prune.strategy=none",),
    "pred2d": ("prune.strategy=pred2d",),
    "backward": ("prune.strategy=pred3d", "prune.direction=backward", "data.last_turn_only=true"),
    "forward": ("prune.strategy=pred3d", "prune.direction=forward", "prune.keep_replaced=false"),
    "keep_replaced": ("prune.strategy=pred3d", "prune.direction=forward", "prune.keep_replaced=true"),
}


def write_windows(samples: Path, folder: Path, screenshots: int, viewport: str, number: int) -> Path:
    """`number` records of that many screenshots in that viewport, spread over the sessions, with their pictures."""
    lines = (samples / "train.jsonl").read_text(encoding="utf-8").splitlines()
    fitting = [
        record
        for record in map(json.loads, lines)
        if len(record["metadata"]["kinds"]) == screenshots and record["metadata"]["viewport"] == viewport
    ]
    if len(fitting) < number:
        raise SystemExit(f"{samples}: {len(fitting)} records of {screenshots} screenshots in {viewport}, not {number}")
    chosen = fitting[:: len(fitting) // number][:number]
    shutil.copytree(samples / "images", folder / "images", dirs_exist_ok=True)
    path = folder / "windows.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in chosen), encoding="utf-8")
    return path


def measure(bench: Bench, rounds: int) -> dict[str, list[Measured]]:
    """Steps of every way, by round; the first round is left out."""
    ways = {
        name: bench.way("PixelPrune", *more, "data.shuffle=false", pack_samples=1, packs=1, num_steps=rounds + 1)
        for name, more in WAYS.items()
    }
    found: dict[str, list[Measured]] = {name: [] for name in ways}
    seen: list[MicroBatch] = []
    for number in range(rounds + 1):
        for name, way in ways.items():
            one = measured(partial(our_step, bench, way, seen), bench.ranks.device)
            one |= {"flops": seen[0].flops, "tokens": seen[0].pack.num_tokens, "record": seen[0].record_ids[0]}
            if number:
                found[name].append(one)
    return found


def summarise(found: dict[str, list[Measured]], clock: str) -> list[dict[str, Any]]:
    """A row for each way; beside it Full's time over its own, and what the FLOPs allow."""
    rows = []
    for name, steps in found.items():
        pairs = list(zip(found["Full"], steps, strict=True))
        row: dict[str, Any] = {"way": name, "over_full": statistics.median(a[clock] / b[clock] for a, b in pairs)}
        row["flops_allow"] = statistics.median(a["flops"] / b["flops"] for a, b in pairs)
        row |= {what: statistics.median(step[what] for step in steps) for what in ("wall_s", "cpu_s", "tokens")}
        rows.append(row | {"steps": steps})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="toy", choices=SHAPES, help="random weights of this size")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--samples", type=Path, default=SAMPLES, help="written by `data_tools sessions`")
    parser.add_argument("--screenshots", type=int, default=5, help="in a record")
    parser.add_argument("--viewport", default="960x640")
    parser.add_argument("--rounds", type=int, default=7, help="counted rounds")
    parser.add_argument("--threads", type=int, default=1, help="torch threads on a cpu")
    parser.add_argument("--folder", type=Path, default=Path("runs/session_step"))
    parser.add_argument("--name", help="name of the record under benchmarks/results")
    parser.add_argument("--no-record", action="store_true")
    arguments = parser.parse_args()
    ranks = only_rank("benchmarks.session_step", arguments.device, arguments.threads)
    folder = arguments.folder / arguments.shapes
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "data").mkdir(parents=True)
    records = write_windows(
        arguments.samples, folder / "data", arguments.screenshots, arguments.viewport, arguments.rounds + 1
    )
    settings = [
        f"model.dtype={'bfloat16' if arguments.device == 'cuda' else 'float32'}", "model.attention=sdpa",
        "model.recompute_vit=0", "model.recompute_llm=0", "data.num_workers=0",
        f"distributed.threads_per_rank={arguments.threads}",
    ]  # fmt: skip
    bench = Bench(arguments.shapes, folder, settings, ranks, records)
    clock = "wall_s" if arguments.device == "cuda" else "cpu_s"
    rows = summarise(measure(bench, arguments.rounds), clock)
    loads = ", ".join(f"{load:.1f}" for load in os.getloadavg())
    sentence = (
        f"Shape {arguments.shapes} (random weights, {bench.config.model.dtype}), a step of one record with "
        f"{arguments.screenshots} screenshots of {arguments.viewport}. Attention: sdpa. No recomputation, no loader "
        f"processes, {arguments.rounds} rounds; ratios are medians over rounds, by {clock[:-2]} time. Load averages at "
        f"the end: {loads}."
    )
    table = markdown_table(
        [
            {
                "way": row["way"],
                "tokens": f"{row['tokens']:,.0f}",
                "step ms": f"{1000 * row['wall_s']:.0f}",
                "CPU ms": f"{1000 * row['cpu_s']:.0f}",
                "over Full": f"{row['over_full']:.2f}x",
                "the FLOPs allow": f"{row['flops_allow']:.2f}x",
            }
            for row in rows
        ]
    )
    print(sentence + "\n\n" + table)
    if not arguments.no_record:
        options = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}
        payload = {"settings": options, "load_average": os.getloadavg(), "rows": rows}
        write_record(
            arguments.name or f"session_step_{arguments.shapes}_{arguments.device}", payload, sentence + "\n\n" + table
        )
    leave_ranks()


if __name__ == "__main__":
    main()
