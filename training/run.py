"""One training run, top to bottom: ranks, data, model, engine, optimizer steps, export."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from training.config import Config
from training.data.loader import MicroBatch, PackLoader
from training.engine import Ranks, build_engine, join_ranks
from training.export import export_model
from training.feed import Feed, build_feed
from training.meter import StepMeter
from training.model import (
    ModelFiles,
    SupervisedModel,
    choose_attention,
    enable_recomputation,
    load_model,
    load_model_files,
)
from training.parameters import count_parts, freeze_parts, lr_factor, set_learning_rates
from training.progress import ProgressLine
from training.recipe import config_to_dict, show
from training.tracking import Tracker
from training.validation import Validator

logger = logging.getLogger(__name__)


def run(config: Config) -> None:
    """Train as the config says, from the first step to the exported model. Every rank calls this."""
    ranks = join_ranks(config)
    folder = Path(config.run.folder) / config.run.name
    _settle(config, ranks, folder)
    files = load_model_files(config.model)
    feed = build_feed(config, config.data.sources, files, ranks, folder, shuffle=True)
    validator = Validator.build(config, files, ranks, folder)
    num_steps = feed.num_steps(config)

    attention = choose_attention(config.model.attention, ranks.device)
    model = load_model(config.model, attention=attention, device=ranks.device)
    freeze_parts(model, config.optim)
    enable_recomputation(model, config.model)
    engine = build_engine(SupervisedModel(model, files.geometry, config.loss), config, ranks.device)
    if ranks.is_first:
        _print_start(config, ranks, files, feed, model, attention, num_steps)

    meter = StepMeter(ranks)
    tracker = Tracker(folder, config.tracking, config.run.name, config_to_dict(config)) if ranks.is_first else None
    progress = ProgressLine(num_steps) if ranks.is_first else None

    def validate(num_done: int) -> None:
        metrics = validator.evaluate(engine)
        if tracker and progress:
            tracker.log(num_done, metrics)
            progress.say(f"step {num_done}: held-out loss {metrics['eval_loss']:.4f}")

    if validator and config.eval.at_start:
        validate(0)
    loader = PackLoader.build(config, feed, files, ranks, num_steps=num_steps)
    for step, batches in loader.steps():
        learning_rates = set_learning_rates(engine.optimizer, lr_factor(step, num_steps, config.schedule))
        run_step(engine, batches, meter)
        metrics = meter.finish() | {"grad_norm": float(engine.get_global_grad_norm())}
        metrics |= {f"lr_{part}": rate for part, rate in learning_rates.items()}
        num_done = step + 1
        if tracker and progress:
            if num_done % config.tracking.log_every == 0 or num_done == num_steps:
                tracker.log(num_done, metrics)
            progress.update(num_done, metrics)
        is_last = num_done == num_steps
        if validator and (is_last or (config.eval.every_steps and num_done % config.eval.every_steps == 0)):
            validate(num_done)
    if progress:
        progress.close()
    if tracker:
        if config.checkpoint.export_at_end:
            facts = {"optimizer steps": num_steps, "retain ratio": f"{meter.retain_ratio:.4f}"}
            path = export_model(folder / "export", model, files, config.prune, config.resize, facts)
            logger.info("model written to %s", path)
        tracker.close()


def run_step(engine, batches: Iterable[MicroBatch], meter: StepMeter) -> None:
    """One optimizer step: forward and backward of every micro-step, gradients reduced, weights updated.

    The loss of a pack is a sum; divided by the supervised tokens of the whole step over all ranks it is this pack's
    share of the mean. ZeRO averages gradients over ranks, hence the factor world size.
    """
    batches = iter(batches)
    while True:
        with meter.timing("data_wait"):
            batch = next(batches, None)
        if batch is None:
            return
        pack = batch.pack.to(engine.device, non_blocking=True)
        engine.set_gradient_accumulation_boundary(batch.is_boundary)
        with meter.timing("forward"):
            sums = engine(pack)
        with meter.timing("backward"):
            share = meter.ranks.world_size / max(1, batch.num_supervised)
            engine.backward(sums.total * share, scale_wrt_gas=False)
        with meter.timing("optimizer"):
            engine.step()
        meter.add_pack(pack, sums, is_dummy=batch.is_dummy)


def _settle(config: Config, ranks: Ranks, folder: Path) -> None:
    """Threads, seeds and the run's folder with its resolved recipe."""
    if ranks.device.type == "cpu":
        # Without this every rank takes all cores, and ranks on one machine slow each other down.
        cores = os.cpu_count() or 1
        torch.set_num_threads(config.distributed.threads_per_rank or max(1, cores // ranks.world_size_per_node))
    seed = config.run.seed + ranks.rank
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    if ranks.is_first:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(show(config))


def _print_start(
    config: Config, ranks: Ranks, files: ModelFiles, feed: Feed, model, attention: str, num_steps: int
) -> None:
    """One table of what is about to run."""
    table = Table(title=config.run.name, show_header=False, title_justify="left")
    table.add_row("model", f"{files.path}  {config.model.dtype}, attention {attention}")
    for count in count_parts(model, config.optim):
        table.add_row(f"  {count.part}", f"{count.num_trained:,} of {count.num_total:,} trained, lr {count.lr:g}")
    table.add_row("data", feed.index.describe())
    prune = config.prune
    table.add_row("pruning", f"{prune.strategy}, metric {prune.metric}, threshold {prune.threshold:g}")
    table.add_row("steps", f"{num_steps} of {config.data.samples_per_step} samples on {ranks.world_size} ranks")
    table.add_row("parallel", f"ZeRO-{config.distributed.zero_stage}, {ranks.device.type}")
    Console(stderr=True).print(table)
