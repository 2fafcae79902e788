"""An epoch over a rendered set, several questions about each screenshot: data.share_prefix off, step and group.

    python -m data_tools render /usr/share/doc --out runs/shots --max-pages 180 --shuffle --alternate-themes \\
        --viewports 1366x768,390x844@2 --max-elements 9
    python -m benchmarks.share_epoch runs/shots/train.jsonl [--steps 8]

The first records of the file, 2,000 of them, make an epoch of a toy model: index, plan, loader without processes,
packs, forward, backward and optimizer of training. The ways take turns step by step in one process on one thread; the
first round is warm-up. With --steps fewer than the epoch has, an epoch's time is the mean step times its steps: the
order is shuffled, so that the steps run are a sample of them.
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.parts.one_rank import only_rank
from benchmarks.parts.record import markdown_table, write_record
from benchmarks.parts.step_meter import PHASES
from benchmarks.parts.step_ways import Bench, Way
from benchmarks.share import our_step
from training.data.loader import MicroBatch
from training.distributed.ranks import leave_ranks

SHARES = ("off", "step", "group")
PACK_SAMPLES = 16
"""Of the longest: what a pack may hold."""


def first_records(path: Path, count: int) -> Path:
    """A file of the first `count` records of a rendered set, beside it, where its images are found."""
    lines = path.read_text().splitlines()[:count]
    if len(lines) < count:
        raise SystemExit(f"{path}: expected {count} records, got {len(lines)}; render more, or set --num-records")
    part = path.with_name(f"first_{count}.jsonl")
    part.write_text("\n".join(lines) + "\n")
    return part


def one_step(bench: Bench, way: Way) -> dict[str, float]:
    """The next optimizer step: the processor's seconds by phase, and what was computed for which records."""
    seen: list[MicroBatch] = []
    found: dict[str, float] = {}
    loss = our_step(bench, way, seen, found)
    rows = way.rows([record for batch in seen for record in batch.record_ids])
    return found | {
        "loss": loss,
        "records": len(rows),
        "screenshots": len(np.unique(way.feed.index.picture_hash[rows])),
        "packs": len(seen),
        "tokens": sum(batch.pack.num_tokens for batch in seen),
        "patches": sum(batch.pack.num_patches for batch in seen),
        "flops": sum(batch.flops for batch in seen),
    }


def summarise(share: str, steps: list[dict[str, float]], num_steps: int) -> dict[str, Any]:
    """Of an epoch of `num_steps`: seconds of the processor by phase, and what is computed."""
    epoch = {what: num_steps * float(np.mean([step[what] for step in steps])) for what in steps[0]}
    epoch["seconds"] = sum(epoch[phase] for phase in PHASES)
    means = {what: float(np.mean([step[what] for step in steps])) for what in ("screenshots", "packs")}
    return {"share": share, "epoch": epoch, "in_a_step": means, "steps": steps}


def table_of(rows: list[dict[str, Any]]) -> str:
    off = rows[0]["epoch"]
    return markdown_table(
        [
            {
                "data.share_prefix": row["share"],
                "screenshots in a step": f"{row['in_a_step']['screenshots']:.1f}",
                "tokens": f"{row['epoch']['tokens'] / off['tokens']:.0%}",
                "ViT patches": f"{row['epoch']['patches'] / off['patches']:.0%}",
                "FLOPs": f"{row['epoch']['flops'] / off['flops']:.0%}",
                "data s": f"{row['epoch']['data_wait']:.0f}",
                "forward + backward s": f"{row['epoch']['forward'] + row['epoch']['backward']:.0f}",
                "optimizer s": f"{row['epoch']['optimizer']:.0f}",
                "epoch s": f"{row['epoch']['seconds']:.0f}",
                "off over this": f"{off['seconds'] / row['epoch']['seconds']:.2f}x",
            }
            for row in rows
        ]
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=Path, help="train.jsonl of a rendered set, questions of a screenshot together")
    parser.add_argument("--num-records", type=int, default=2000, help="of an epoch")
    parser.add_argument("--samples-per-step", type=int, default=64)
    parser.add_argument("--max-pixels", type=int, default=200_000, help="larger screenshots are shrunk to this")
    parser.add_argument("--steps", type=int, help="counted steps of each way; the whole epoch if not given")
    parser.add_argument("--folder", type=Path, default=Path("runs/share_epoch"))
    parser.add_argument("--no-record", action="store_true")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    ranks = only_rank("benchmarks.share_epoch", "cpu", 1)
    shutil.rmtree(arguments.folder, ignore_errors=True)
    records = first_records(arguments.records, arguments.num_records)
    settings = [
        "model.dtype=float32", "model.attention=sdpa", "model.recompute_vit=0", "model.recompute_llm=0",
        "data.num_workers=0", "distributed.threads_per_rank=1", f"resize.max_pixels={arguments.max_pixels}",
    ]  # fmt: skip
    bench = Bench("toy", arguments.folder, settings, ranks, records)
    num_steps = -(-arguments.num_records // arguments.samples_per_step)
    counted = min(arguments.steps or num_steps, num_steps)
    ways = {
        share: bench.way(
            "PixelPrune", f"data.share_prefix={share}", "data.max_shared=16", pack_samples=PACK_SAMPLES,
            packs=arguments.samples_per_step // PACK_SAMPLES, num_steps=counted + 1,
        )
        for share in SHARES
    }  # fmt: skip
    found: dict[str, list[dict[str, float]]] = {share: [] for share in SHARES}
    for number in range(counted + 1):
        for share, way in ways.items():
            step = one_step(bench, way)
            if number:
                found[share].append(step)
        print(f"step {number} of {counted}", flush=True)
    index = ways["off"].feed.index
    rows = [summarise(share, steps, num_steps) for share, steps in found.items()]
    loads = ", ".join(f"{load:.1f}" for load in os.getloadavg())
    sentence = (
        f"{len(index):,} rendered records about {len(np.unique(index.picture_hash)):,} screenshots, shrunk to at most "
        f"{arguments.max_pixels / 1e6:g} megapixels, pruned by pred2d; toy shape, float32, "
        f"{arguments.samples_per_step} records in a step, packs of up to {PACK_SAMPLES} of the longest, "
        "no recomputation, no loader processes. "
        f"{counted} of the epoch's {num_steps} steps were run by each way, in turns; CPU seconds of one epoch"
        f"{'' if counted == num_steps else ' by the mean step'}. Load averages at the end: {loads}."
    )
    table = table_of(rows)
    print(sentence + "\n\n" + table)
    if not arguments.no_record:
        options = {key: value for key, value in vars(arguments).items() if not isinstance(value, Path)}
        payload = {"settings": options, "load_average": os.getloadavg(), "rows": rows}
        write_record("share_epoch", payload, sentence + "\n\n" + table)
    leave_ranks()


if __name__ == "__main__":
    main()
