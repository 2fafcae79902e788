"""What pruning saves in a training step: Full, PixelPrune and Resize at the same budget, and what a teacher adds.

    python -m benchmarks.train_step --shapes toy --device cpu
    python -m benchmarks.train_step --shapes 2b --device cuda --retain 0.4 --megapixels 3.5 --kd --profile PICTURE.png
    python -m benchmarks.train_step --shapes 2b --images FOLDER model.recompute_vit=1 distributed.reduce_bucket_size=...

Real optimizer steps: loader, packs, engine and `run_step` of training, one way after the other in every round, all on
one model. The screenshots are synthetic and keep exactly the ratio asked for, or come from a folder of .png files. A
pack holds `--pack-samples` screenshots in every way, a step `--packs` packs, so all ways do the same steps and differ
in lengths alone. Times are medians over the steps after warm-up, ratios to Full are taken round by round.

FLOPs are the cost model's, with recomputation and teacher: "of FLOPs" is the speed-up as a share of what the FLOPs
allow. MFU counts the model's FLOPs on kept tokens, without recomputation. Waiting for data is measured in steps that
follow each other, after the packs made ahead are used up; with `--workers 0` all of the preparation is waiting.
`key=value` arguments are settings as in a recipe.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.exact_screens import write_exact_screens, write_records
from benchmarks.parts.one_rank import only_rank
from benchmarks.parts.record import markdown_table, write_record
from benchmarks.parts.shapes import SHAPES
from benchmarks.parts.step_meter import DeviceMeter, peak_bytes, reset_peak
from benchmarks.parts.step_profile import draw_profile, profile_step
from benchmarks.parts.step_ways import WITH_TEACHER, Bench, Step, Way
from training.data.loader import MicroBatch
from training.distributed.ranks import leave_ranks
from training.loop.step import run_step

PRUNED = ("Full", "PixelPrune", "Resize")
Rounds = dict[str, list[list[Step]]]


def one_step(bench: Bench, way: Way) -> Step:
    """The next optimizer step of a way."""
    device, records = bench.ranks.device, list[str]()
    bench.prepare(way)
    reset_peak(device)
    held = peak_bytes(device)
    _, batches = next(way.steps)
    meter, flops = DeviceMeter(bench.ranks), [0.0]

    def seen() -> Iterator[MicroBatch]:
        for batch in batches:
            records.extend(batch.record_ids)
            flops[0] += batch.flops
            yield batch

    run_step(bench.engine, seen(), meter)
    seconds, metrics = meter.finish_step()
    rows = way.rows(records)
    square = None if way.whole_square is None else float(way.whole_square[rows].sum())
    return Step(seconds, metrics, flops[0], float(way.executed[rows].sum()), square, held, peak_bytes(device))


def measure(
    bench: Bench,
    names: tuple[str, ...],
    arguments: argparse.Namespace,
    after_round: Callable[[Rounds], None] = lambda rounds: None,
) -> tuple[Rounds, dict[str, Way]]:
    """Steps of every way, by round; in each round all ways take their turn. The first round is warm-up.

    after_round: called with what has been measured so far, after every round but the first.
    """
    rounds: Rounds = {name: [] for name in names}
    ways = {}
    for name in names:
        ways[name] = bench.way(
            name, pack_samples=arguments.pack_samples, packs=arguments.packs, num_steps=num_steps(arguments)
        )
    for number in range(arguments.rounds + 1):
        for name, way in ways.items():
            steps = [one_step(bench, way) for _ in range(way.warm_up_steps + arguments.block)]
            if number:
                rounds[name].append(steps[way.warm_up_steps :])
        if number:
            after_round(rounds)
    return rounds, ways


def num_steps(arguments: argparse.Namespace) -> int:
    """More than are ever taken: the loader makes packs ahead and would otherwise run out of steps."""
    return 100 * (arguments.rounds + 2) * (arguments.block + 1)


def summarise(name: str, rounds: list[list[Step]], full: list[list[Step]]) -> dict[str, Any]:
    """A row of the record: medians of this way and its ratios to Full in the same rounds."""
    steps = [step for block in rounds for step in block]

    def middle(what: str) -> float:
        return statistics.median(step.metrics[what] for step in steps)

    times = {f"{key}_ms": 1000 * statistics.median(s.seconds[key] for s in steps) for key in steps[0].seconds}
    ratios = [_block_seconds(a) / _block_seconds(b) for a, b in zip(full, rounds, strict=True)]
    flops_ratio = _total(full, "executed_flops") / _total(rounds, "executed_flops")
    peaks = [step.peak_bytes for step in steps if step.peak_bytes is not None]
    full_peaks = [step.peak_bytes for block in full for step in block if step.peak_bytes is not None]
    return {
        "mode": name,
        **times,
        "data_wait_share": statistics.median(s.seconds["data_wait"] / s.seconds["step"] for s in steps),
        "retain_ratio": middle("retain_ratio"),
        "kept_tokens_per_s": middle("kept_tokens_per_s"),
        "samples_per_s": middle("samples_per_s"),
        "mfu": middle("mfu") if "mfu" in steps[0].metrics else None,
        "loss": middle("loss"),
        "peak_gb": max(peaks) / 1e9 if peaks else None,
        "memory_change": max(peaks) / max(full_peaks) - 1 if peaks and full_peaks else None,
        "step_adds_gb": _added_gb(rounds),
        "model_flops": _total(rounds, "model_flops") / len(steps),
        "executed_flops": _total(rounds, "executed_flops") / len(steps),
        "model_flops_ratio": _total(full, "model_flops") / _total(rounds, "model_flops"),
        "flops_ratio": flops_ratio,
        "flops_ratio_whole_square": None
        if steps[0].whole_square is None
        else _total(full, "whole_square") / _total(rounds, "whole_square"),
        "speed_up": statistics.median(ratios),
        "speed_up_by_round": ratios,
        "speed_up_of_flops_ratio": statistics.median(ratios) / flops_ratio,
        "step_seconds": [[step.seconds["step"] for step in block] for block in rounds],
    }


def _block_seconds(block: list[Step]) -> float:
    return statistics.median(step.seconds["step"] for step in block)


def _added_gb(rounds: list[list[Step]]) -> float | None:
    """Memory that a step takes and gives back: activations, gradients, buffers."""
    added = [s.peak_bytes - s.held_bytes for block in rounds for s in block if s.peak_bytes and s.held_bytes]
    return statistics.median(added) / 1e9 if added else None


def _total(rounds: list[list[Step]], what: str) -> float:
    return sum(getattr(step, what) for block in rounds for step in block)


def table_of(rows: list[dict[str, Any]]) -> str:
    def percent(value: float | None, form: str = ".1%") -> str:
        return "-" if value is None else format(value, form)

    return markdown_table(
        [
            {
                "mode": row["mode"],
                "retain": f"{row['retain_ratio']:.1%}",
                "forward ms": f"{row['forward_ms']:.0f}",
                "backward ms": f"{row['backward_ms']:.0f}",
                "optimizer ms": f"{row['optimizer_ms']:.0f}",
                "step ms": f"{row['step_ms']:.0f}",
                "data wait": percent(row["data_wait_share"]),
                "peak GB": "-" if row["peak_gb"] is None else f"{row['peak_gb']:.2f}",
                "of it in the step": "-" if row["step_adds_gb"] is None else f"{row['step_adds_gb']:.2f}",
                "memory": "-" if row["mode"] == "Full" else percent(row["memory_change"], "+.1%"),
                "MFU": percent(row["mfu"]),
                "kept tokens/s": f"{row['kept_tokens_per_s']:.0f}",
                "samples/s": f"{row['samples_per_s']:.2f}",
                "TFLOPs": f"{row['executed_flops'] / 1e12:.3g}",
                "speed-up": f"{row['speed_up']:.2f}x",
                "FLOPs ratio": f"{row['flops_ratio']:.2f}x",
                "whole square": "-"
                if row["flops_ratio_whole_square"] is None
                else f"{row['flops_ratio_whole_square']:.2f}x",
                "of FLOPs": f"{row['speed_up_of_flops_ratio']:.2f}",
            }
            for row in rows
        ]
    )


def write_data(arguments: argparse.Namespace, folder: Path) -> Path:
    """Records of twice as many screenshots as a step takes, so that steps differ."""
    num = 2 * arguments.pack_samples * arguments.packs
    if arguments.images is None:
        return write_exact_screens(folder, num, arguments.megapixels, arguments.retain)
    files = sorted(arguments.images.glob("*.png"))
    if not files:
        raise SystemExit(f"{arguments.images}: no .png files (--images)")
    chosen = [files[i * len(files) // num] for i in range(num)]
    (folder / "images").mkdir(parents=True)
    names = []
    for number, file in enumerate(chosen):
        names.append(f"images/{number:04d}-{file.name}")
        shutil.copyfile(file, folder / names[-1])
    return write_records(folder, names)


def profiles(bench: Bench, ways: dict[str, Way]) -> dict[str, dict[str, float]]:
    """Seconds by part of a step of Full and of PixelPrune: medians of a few more steps."""
    found = {}
    for name in ("Full", "PixelPrune"):
        for _ in range(ways[name].warm_up_steps):
            one_step(bench, ways[name])
        steps = [profile_step(bench.module, lambda way=ways[name]: one_step(bench, way)) for _ in range(3)]
        found[name] = {part: statistics.median(step[part] for step in steps) for part in steps[0]}
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="toy", choices=SHAPES, help="random weights of this size")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--retain", type=float, default=0.4, help="share of kept blocks of the synthetic screenshots")
    parser.add_argument("--megapixels", type=float, help="their size; default 3.5 on cuda, 1.5 on cpu")
    parser.add_argument("--images", type=Path, help="folder of .png screenshots to use instead")
    parser.add_argument("--kd", action="store_true", help="add PixelPrune with a cached and with an online teacher")
    parser.add_argument("--pack-samples", type=int, help="screenshots in a pack; default 4 on cuda, 1 on cpu")
    parser.add_argument(
        "--packs", type=int, help="packs (micro-steps) in an optimizer step; default 2 on cuda, 1 on cpu"
    )
    parser.add_argument("--rounds", type=int, help="rounds after the warm-up; default 2 on cuda, 5 on cpu")
    parser.add_argument("--block", type=int, help="counted steps of a way in a round; default 3 on cuda, 1 on cpu")
    parser.add_argument("--workers", type=int, help="loader processes; default 4 on cuda, 0 on cpu")
    parser.add_argument("--recompute-vit", type=int, default=1, help="every k-th layer; 1 all, 0 none")
    parser.add_argument("--recompute-llm", type=int, default=1, help="the same for the language model")
    parser.add_argument("--threads", type=int, default=1, help="torch threads on a cpu")
    parser.add_argument("--profile", type=Path, help="picture of where the time goes, Full beside PixelPrune")
    parser.add_argument("--folder", type=Path, default=Path("runs/train_step"))
    parser.add_argument("--name", help="name of the record under benchmarks/results")
    parser.add_argument("--no-record", action="store_true")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings as in a recipe")
    arguments = parser.parse_intermixed_args()
    on_cuda = arguments.device == "cuda"
    defaults = {"megapixels": (3.5, 1.5), "pack_samples": (4, 1), "packs": (2, 1)}
    # 63 steps of 2B shapes with both teachers: 110 PFLOP by the cost model, five minutes at 400 TFLOP/s.
    defaults |= {"rounds": (2, 5), "block": (3, 1), "workers": (4, 0)}
    for name, (cuda, cpu) in defaults.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, cuda if on_cuda else cpu)
    return arguments


def main() -> None:
    arguments = parse()
    ranks = only_rank("benchmarks.train_step", arguments.device, arguments.threads)
    folder = arguments.folder / arguments.shapes
    shutil.rmtree(folder, ignore_errors=True)
    records = write_data(arguments, folder / "data")
    settings = [
        f"model.dtype={'bfloat16' if arguments.device == 'cuda' else 'float32'}",
        f"model.recompute_vit={arguments.recompute_vit}", f"model.recompute_llm={arguments.recompute_llm}",
        f"data.num_workers={arguments.workers}", f"distributed.threads_per_rank={arguments.threads}",
        *arguments.overrides,
    ]  # fmt: skip
    bench = Bench(arguments.shapes, folder, settings, ranks, records)
    rows: list[dict[str, Any]] = []

    def keep(rounds: Rounds) -> None:
        """What a benchmark that is cut off leaves: the record of the rounds until then."""
        rows[:] = [summarise(name, rounds[name], rounds["Full"]) for name in PRUNED]
        record(arguments, bench, rows, {})

    ways = measure(bench, PRUNED, arguments, keep)[1]
    found = profiles(bench, ways) if arguments.profile else {}
    del ways
    for name in WITH_TEACHER if arguments.kd else ():
        # One after the other, each beside Full again: no teacher is held while another one is measured.
        distilled = measure(bench, ("Full", name), arguments)[0]
        rows.append(summarise(name, distilled[name], distilled["Full"]))
        if rows[0]["peak_gb"]:  # that of Full without a teacher
            rows[-1]["memory_change"] = rows[-1]["peak_gb"] / rows[0]["peak_gb"] - 1
        record(arguments, bench, rows, found)
        bench.forget_teacher()
    print(describe(arguments, bench) + "\n\n" + table_of(rows))
    if arguments.profile:
        title = (
            f"{arguments.shapes} shape on {arguments.device}: where a step goes (forward + recomputation + backward)"
        )
        draw_profile(found, title, arguments.profile)
    record(arguments, bench, rows, found)
    leave_ranks()


def record(
    arguments: argparse.Namespace, bench: Bench, rows: list[dict[str, Any]], found: dict[str, dict[str, float]]
) -> None:
    """Write what there is, over what was written before."""
    if arguments.no_record:
        return
    options = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}
    if arguments.images:
        options["images"] = arguments.images.name  # no path of this machine in a committed record
    payload = {
        "settings": options,
        "attention": bench.attention,
        "recomputed_vit_llm": bench.recomputed,
        "load_average": os.getloadavg(),
        "rows": rows,
        "profile_seconds": found,
    }
    name = arguments.name or f"train_step_{arguments.shapes}_{arguments.device}"
    write_record(name, payload, describe(arguments, bench) + "\n\n" + table_of(rows))


def describe(arguments: argparse.Namespace, bench: Bench) -> str:
    """What was run, in a sentence above the table."""
    screens = f"{arguments.megapixels:g} megapixels"
    if arguments.images:
        screens = f"real, from {arguments.images.name}"
    num = sum(parameter.numel() for parameter in bench.model.parameters()) / 1e6
    vit, llm = bench.recomputed
    return (
        f"Shape {arguments.shapes} ({num:,.1f} million parameters, random weights, {bench.config.model.dtype}), "
        f"{arguments.pack_samples} screenshots in a pack ({screens}), {arguments.packs} packs in a step; attention "
        f"{bench.attention}; recomputed layers: {vit:.0%} of the ViT, {llm:.0%} of the language model; "
        f"{arguments.workers} loader workers; {arguments.rounds} rounds of {arguments.block} counted steps of each way."
    )


if __name__ == "__main__":
    main()
