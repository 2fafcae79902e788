"""What a teacher costs: step time and bytes moved to the device for CE, KD cached and KD online, on the same packs.

    python -m benchmarks.kd_cost [--repeats 7] [--samples 12] [--max-pixels 262144]

Real optimizer steps (forward, backward, ZeRO-2 update) of a toy Qwen3-VL on the sample screenshots, one way after the
other within each repeat, packs prepared beforehand. Twice: with the toy vocabulary and with the 151,936 tokens of the
published models. With these a toy model overstates the price of the cached teacher, whose only work is the output head:
at the toy's width that is most of the whole step, in a real model a small part. One thread, one rank; CPU time, which
other work on the machine disturbs least.
"""

import argparse
import dataclasses
import logging
import shutil
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from benchmarks.parts.one_rank import is_rank, run_as_rank
from benchmarks.parts.record import markdown_table, write_record
from pixelprune.flops import CostModel
from training.composition.toy import build_toy_model, texts_of_records
from training.config.recipe import load_recipe
from training.config.settings import Config
from training.data.loader import MicroBatch
from training.distributed.engine import build_engine
from training.distributed.ranks import Ranks, join_ranks
from training.loop.context import RunContext
from training.loop.feed import build_feed, prepare_settings, training_loader
from training.loop.step import run_step
from training.loop.teacher_cache import build_cache
from training.model.loading import load_model, load_model_files
from training.model.supervised import SupervisedModel
from training.teacher.files import plan_teacher
from training.teacher.teachers import build_teacher
from training.tracking.meter import StepMeter

SAMPLES = Path("data_tools/samples/train.jsonl")
REAL_VOCABULARY = 151_936
MODES = {
    "CE": ("loss.kd_weight=0",),
    "KD cached": ("kd.source=cached",),
    "KD cached, top 64": ("kd.source=cached", "kd.top_k=64"),
    "KD online": ("kd.source=online",),
    "KD online, threshold 0.02": ("kd.source=online", "prune.threshold=0.02"),
}


@dataclass
class Way:
    """One way to train, ready to step."""

    engine: Any
    batches: list[MicroBatch]
    flops: float
    seconds: list[float] = dataclasses.field(default_factory=list)


def make_model(folder: Path, vocab: int | None) -> Path:
    """The toy model, its embedding widened to `vocab` rows if asked for."""
    build_toy_model(folder, texts_of_records(SAMPLES))
    if vocab:
        config = AutoConfig.from_pretrained(folder)
        config.text_config.vocab_size = vocab
        torch.manual_seed(0)
        AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    return folder


def prepare(config: Config, ranks: Ranks) -> Way:
    """The engine and the packs of one optimizer step, as `training.loop.run` makes them."""
    folder = Path(config.run.folder)
    files = load_model_files(config.model)
    context = RunContext(config, ranks, folder, files)
    teacher_plan = plan_teacher(config.kd, config.model, config.loss, prepare_settings(config, files), files, ranks)
    feed = build_feed(context, config.data.sources, shuffle=True, teacher_plan=teacher_plan)
    model = load_model(config.model, attention="sdpa", device=ranks.device)
    teacher = build_teacher(config.kd, config.model, config.loss, teacher_plan, ranks, "sdpa")
    engine = build_engine(
        SupervisedModel(model, files.geometry, config.loss, teacher),
        ranks,
        config.distributed,
        config.optim,
        config.model.dtype,
    )
    loader = training_loader(context, feed, num_steps=1)
    batches = [batch for _, step in loader.steps() for batch in step]
    return Way(engine, batches, _planned_flops(feed, files, batches))


def _planned_flops(feed, files, batches: list[MicroBatch]) -> float:
    """FLOPs of the step by the cost model, an online teacher's included."""
    ids = {record for batch in batches for record in batch.record_ids}
    rows = [row for row in range(len(feed.index)) if feed.index.record_id(row) in ids]
    inputs = feed.index.plan_input(CostModel.from_config(files.config), with_teacher=feed.prepare.with_full)
    return float(inputs.cost[rows].sum())


def pixel_bytes(batch: MicroBatch) -> int:
    full = getattr(batch.pack, "full", None)
    return batch.pack.blocks.nbytes + (full.blocks.nbytes if full is not None else 0)


def measure(name: str, vocab: int | None, settings: argparse.Namespace, ranks: Ranks) -> list[dict[str, Any]]:
    """Rows of one vocabulary; ratios are to CE in the same repeats."""
    folder = settings.folder / name.replace(" ", "_")
    model = make_model(folder / "model", vocab)
    common = [
        f"model.path={model}", f"run.folder={folder}", f"data.index_dir={settings.folder}/index", "eval.at_start=false",
        "data.eval_sources=[]", f"data.samples_per_step={settings.samples}", "data.pack_tokens=65536",
        "data.pack_patches=262144", f"resize.max_pixels={settings.max_pixels}", "resize.min_pixels=65536",
        "distributed.threads_per_rank=1", f"kd.cache_dir={folder}/cache",
        f"data.sources.0.path={folder}/records.jsonl", "data.sources.0.root=data_tools/samples",
    ]  # fmt: skip
    lines = SAMPLES.read_text().splitlines()
    (folder / "records.jsonl").write_text(
        "\n".join(lines[:: len(lines) // settings.samples][: settings.samples]) + "\n"
    )
    configs = {
        mode: load_recipe("configs/kd_recovery_debug.yaml", [*common, *overrides]) for mode, overrides in MODES.items()
    }
    for config in configs.values():
        if config.loss.kd_weight and config.kd.source == "cached":
            build_cache(config, ranks)
    ways = {mode: prepare(config, ranks) for mode, config in configs.items()}
    same = {mode: [batch.record_ids for batch in way.batches] for mode, way in ways.items()}
    assert all(ids == same["CE"] for ids in same.values()), "every way trains on the same packs"
    meter = StepMeter(ranks)
    for repeat in range(settings.repeats + 1):
        for way in ways.values():
            started = time.process_time()
            run_step(way.engine, way.batches, meter)
            if repeat:  # the first is warm-up
                way.seconds.append(time.process_time() - started)
    base = ways["CE"]
    rows = []
    for mode, way in ways.items():
        pixels = sum(pixel_bytes(batch) for batch in way.batches)
        everything = sum(tensor.nbytes for batch in way.batches for tensor in batch.pack.tensors())
        rows.append(
            {
                "vocabulary": name,
                "mode": mode,
                "seconds": statistics.median(way.seconds),
                "time_ratio": statistics.median(a / b for a, b in zip(way.seconds, base.seconds, strict=True)),
                "flops_ratio": way.flops / base.flops,
                "pixel_bytes": pixels,
                "all_bytes": everything,
                "num_supervised": sum(batch.pack.num_supervised for batch in way.batches),
                "samples": way.seconds,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--samples", type=int, default=12, help="samples of the optimizer step, all in one pack")
    parser.add_argument("--max-pixels", type=int, default=262144, help="screenshots are resized to this many")
    parser.add_argument("--folder", type=Path, default=Path("runs/kd_cost"))
    parser.add_argument("--no-record", action="store_true")
    settings = parser.parse_args()
    if not is_rank():
        sys.exit(run_as_rank("benchmarks.kd_cost", sys.argv[1:]))
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    shutil.rmtree(settings.folder, ignore_errors=True)
    ranks = join_ranks()
    rows = measure("toy", None, settings, ranks) + measure("151,936", REAL_VOCABULARY, settings, ranks)
    table = markdown_table(
        [
            {
                "vocabulary": row["vocabulary"],
                "": row["mode"],
                "CPU s of a step": f"{row['seconds']:.2f}",
                "time / CE": f"{row['time_ratio']:.2f}",
                "FLOPs / CE": f"{row['flops_ratio']:.2f}",
                "pixel MB to the device": f"{row['pixel_bytes'] / 1e6:.2f}",
                "all MB to the device": f"{row['all_bytes'] / 1e6:.2f}",
            }
            for row in rows
        ]
    )
    print(table)
    if not settings.no_record:
        options = {key: str(value) if isinstance(value, Path) else value for key, value in vars(settings).items()}
        write_record("kd_cost", {"settings": options, "rows": rows}, table)


if __name__ == "__main__":
    main()
