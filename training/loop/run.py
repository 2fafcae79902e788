"""One training run, top to bottom: ranks, data, model, engine, optimizer steps, checkpoints, export."""

from __future__ import annotations

import dataclasses
import logging
import random
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from pixelprune.files import write_whole
from training.checkpoint.checkpointer import Checkpointer, RunState
from training.checkpoint.export import export_model, run_facts
from training.config.recipe import show
from training.config.settings import Config
from training.data.loader import START, Cursor, MicroBatch, PackLoader
from training.distributed.cores import use_threads
from training.distributed.engine import Ranks, build_engine, join_ranks
from training.distributed.stopping import Agreement, StopRequest
from training.errors import RankError, StopAskedError, UserError
from training.exit_codes import FINISHED, RESUMABLE
from training.loop.evaluations import Evaluations
from training.loop.feed import Feed, build_feed
from training.loop.folder_lock import FolderLock
from training.loop.journal import Journal
from training.loop.memory import plan_memory
from training.loop.start_table import print_start_table
from training.model.attention import choose_attention
from training.model.loading import DTYPES, load_model, load_model_files, prepare_layers
from training.model.lora import add_adapters
from training.model.parameters import freeze_parts, lr_factor, set_learning_rates, trains_vision
from training.model.supervised import SupervisedModel
from training.teacher.files import find_teaching
from training.teacher.teachers import build_teacher
from training.tracking.meter import StepMeter
from training.tracking.provenance import describe_provenance

logger = logging.getLogger(__name__)


def run(config: Config) -> int:
    """Train as the config says, from the newest checkpoint or the start to the exported model.

    Every rank calls this. Returns the exit code: FINISHED, or RESUMABLE after a requested stop.
    """
    folder = Path(config.run.folder) / config.run.name
    stop = StopRequest(folder)
    ranks = join_ranks(config)
    with _settled(config, ranks, folder):
        try:
            return _train(config, ranks, folder, stop)
        except StopAskedError:
            logger.info("rank %d: stopped before the first step; start again to continue", ranks.rank)
            return RESUMABLE


def _train(config: Config, ranks: Ranks, folder: Path, stop: StopRequest) -> int:
    agreement = Agreement(ranks, config.distributed.timeout_minutes)
    files = load_model_files(config.model)
    teaching = find_teaching(config, files, ranks)
    sources = config.data.sources
    feed = build_feed(
        config, sources, files, ranks, folder, shuffle=True, teaching=teaching, stop=stop, agreement=agreement
    )
    num_steps = feed.num_steps(config)
    evaluations = Evaluations(config, files, ranks, folder, num_steps, stop, agreement)

    if not ranks.has_launcher:
        raise UserError(
            "training needs a launcher: `python -m launch RECIPE --ranks 1`, "
            "`deepspeed --module training.train RECIPE` or `torchrun -m training.train RECIPE`"
        )
    if agreement.any_rank(stop.is_asked):
        raise StopAskedError
    attention = choose_attention(config.model.attention, ranks.device, DTYPES[config.model.dtype])
    model = load_model(config.model, attention=attention, device=ranks.device)
    freeze_parts(model, config.optim)
    add_adapters(model, config.lora)
    memory = plan_memory(config, model, ranks, attention, teaching)
    prepare_layers(model, memory.applied_to(config.model), ranks.device)
    teacher = build_teacher(config, teaching, ranks, attention)
    engine = build_engine(SupervisedModel(model, files.geometry, config.loss, teacher), config, ranks.device)
    facts = {"config.yaml": show(config), "environment.json": describe_provenance()}
    checkpointer = Checkpointer(folder, config.checkpoint, ranks, facts)
    state, cursor = _starting_point(config, ranks, feed, engine, checkpointer)
    journal = Journal(config, ranks, folder, num_steps, state)
    if ranks.is_first:
        print_start_table(config, ranks, files, feed, model, attention, memory, num_steps, state.step)

    meter = StepMeter(ranks, state.totals)
    broken_off = evaluations.catch_up(engine, state.step, journal)
    if broken_off or (state.step == 0 and agreement.any_rank(stop.is_asked)):
        journal.close()
        return RESUMABLE
    # The ranks of a sharded teacher fetch its layers together: each needs an image when one has.
    dummy = trains_vision(model) or config.kd.sharding == "zero3"
    loader = PackLoader.build(
        config, feed, files, ranks, num_steps=num_steps, cursor=cursor, first_step=state.step, dummy_image=dummy
    )
    skips = _SkipCounter(config.optim.max_skipped_in_a_row, state.num_skipped)
    for step, batches in loader.steps():
        learning_rates = set_learning_rates(engine.optimizer, lr_factor(step, num_steps, config.schedule))
        outcome = run_step(engine, batches, meter)
        skips.count(engine, outcome, step)
        metrics = meter.finish()
        metrics |= {"grad_norm": float(engine.get_global_grad_norm()), "num_skipped": skips.total}
        metrics |= {f"lr_{part}": rate for part, rate in learning_rates.items()}
        num_done = step + 1
        journal.stepped(num_done, metrics)

        stopping, failed = agreement.any(stop.is_asked, checkpointer.has_failed)
        if failed:
            _report_failed_save(checkpointer, config)
        totals = dataclasses.replace(meter.totals)
        state = RunState(num_done, outcome.cursor, totals, skips.total, state.tracker_id, feed.order)
        every = config.checkpoint.every_steps
        is_due = num_done == num_steps or bool(every and num_done % every == 0)
        if is_due:
            checkpointer.save(engine, state)
        if stopping or evaluations.after(engine, num_done, journal):
            if not is_due:
                checkpointer.save(engine, state)
            journal.close()
            saved = "saved" if _is_saved_everywhere(checkpointer, agreement, config) else "NOT saved"
            logger.info("rank %d: stopped after step %d, %s; start again to continue", ranks.rank, num_done, saved)
            return RESUMABLE
    checkpointer.finish()
    if ranks.is_first and config.checkpoint.export_at_end:
        path = export_model(folder / "export", model, files, config, run_facts(folder, num_steps, meter.totals))
        logger.info("model written to %s", path)
    journal.close()
    return FINISHED


def _starting_point(
    config: Config, ranks: Ranks, feed: Feed, engine: Any, checkpointer: Checkpointer
) -> tuple[RunState, Cursor]:
    """The newest complete checkpoint, loaded into the engine, or a new run; and where its data goes on."""
    newest = checkpointer.latest()
    if not newest:
        return RunState(tracker_id=_new_id(ranks)), START
    state = checkpointer.load(engine, newest)
    return state, feed.continued(state.cursor, state.order, config.checkpoint.on_changed_data)


def _report_failed_save(checkpointer: Checkpointer, config: Config) -> None:
    """End the run, or go on, on all ranks alike after a save that failed on one of them (checkpoint.on_error)."""
    checkpointer.finish()
    if config.checkpoint.on_error == "stop":
        raise UserError("saving a checkpoint failed on another rank, which says why (checkpoint.on_error)")


def _is_saved_everywhere(checkpointer: Checkpointer, agreement: Agreement, config: Config) -> bool:
    """Wait for the save on all ranks: the launcher kills the others 30 s after the first that leaves with a code."""
    checkpointer.wait()
    agreement.meet(config.distributed.timeout_minutes + config.checkpoint.save_timeout_minutes)
    (failed,) = agreement.any(checkpointer.has_failed)
    if failed:
        _report_failed_save(checkpointer, config)
    return not failed


class StepOutcome(NamedTuple):
    """Where the data continues after a step, and which packs it was made of on this rank, each with its loss sum."""

    cursor: Cursor
    packs: list[tuple[tuple[str, ...], torch.Tensor]]


def run_step(engine, batches: Iterable[MicroBatch], meter: StepMeter) -> StepOutcome:
    """One optimizer step: forward and backward of every micro-step, gradients reduced, weights updated.

    The loss of a pack is a sum; divided by the supervised tokens of the whole step over all ranks it is this pack's
    share of the mean. ZeRO averages gradients over ranks, hence the factor world size.
    Raises RankError when the device's memory does not hold a pack.
    """
    batches, packs, batch = iter(batches), [], None
    meter.begin()
    while True:
        with meter.timing("data_wait"):
            following = next(batches, None)
        if following is None:
            assert batch is not None, "a step has at least one micro-step"
            return StepOutcome(batch.cursor, packs)
        batch = following
        try:
            pack = batch.pack.to(engine.device, non_blocking=True)
            engine.set_gradient_accumulation_boundary(batch.is_boundary)
            with meter.timing("forward"):
                sums = engine(pack)
            with meter.timing("backward"):
                share = meter.ranks.world_size / max(1, batch.num_supervised)
                engine.backward(sums.total * share, scale_wrt_gas=False)
            with meter.timing("optimizer"):
                engine.step()
        except torch.OutOfMemoryError as error:
            raise RankError(_out_of_memory(batch, meter.ranks)) from error
        except RuntimeError as error:
            # A collective that timed out says nothing of where: this does.
            error.add_note(
                f"on rank {meter.ranks.rank} in optimizer step {batch.step + 1}, micro-step {batch.micro_step}"
            )
            raise
        meter.add_pack(pack, sums, is_dummy=batch.is_dummy, flops=batch.flops)
        packs.append((batch.record_ids, sums.total.detach()))


class _SkipCounter:
    """Steps that ZeRO skipped because loss or gradient was not finite; so many in a row end the run."""

    def __init__(self, limit: int, total: int):
        self.limit, self.total, self.in_a_row = limit, total, 0

    def count(self, engine, outcome: StepOutcome, step: int) -> None:
        if not engine.optimizer.overflow:
            self.in_a_row = 0
            return
        self.total += 1
        self.in_a_row += 1
        bad = [ids for ids, loss in outcome.packs if not torch.isfinite(loss)] or [ids for ids, _ in outcome.packs]
        records = ", ".join(record for ids in bad for record in ids)
        logger.error("step %d skipped: loss or gradient not finite; records on this rank: %s", step + 1, records)
        if self.in_a_row >= self.limit:
            raise RankError(
                f"{self.in_a_row} steps in a row had a non-finite loss or gradient (optim.max_skipped_in_a_row="
                f"{self.limit}); lower optim.lr or look at the last step's records: {records}"
            )


def _out_of_memory(batch: MicroBatch, ranks: Ranks) -> str:
    pack, records = batch.pack, ", ".join(batch.record_ids)
    return (
        f"rank {ranks.rank}, step {batch.step + 1}: out of memory in a pack of {pack.num_tokens} tokens, "
        f"{pack.num_patches} patches, {pack.num_supervised} supervised (records {records}); lower data.pack_tokens or "
        "data.pack_patches, or set model.recompute_vit=1 and model.recompute_llm=1"
    )


@contextmanager
def _settled(config: Config, ranks: Ranks, folder: Path) -> Iterator[None]:
    """Threads, seeds and the run's folder with its resolved recipe, locked against a second run.

    `python -m launch` holds a lock of its own from start to restart; this one covers starts without it.
    """
    if ranks.device.type == "cpu":
        use_threads(config.distributed.threads_per_rank, ranks.cores_per_rank)
    seed = config.run.seed + ranks.rank
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    lock, refused = FolderLock(folder, "train.lock"), [""]
    if ranks.is_first:
        try:
            lock.acquire()
            write_whole(folder / "config.yaml", show(config).encode())
        except UserError as error:
            refused = [str(error)]
    dist.broadcast_object_list(refused, src=0)
    if refused[0]:
        raise UserError(refused[0])
    try:
        yield
    finally:
        lock.release()


def _new_id(ranks: Ranks) -> str:
    """Id of a new run in tracking, the same on all ranks."""
    ids = [secrets.token_hex(4)]
    dist.broadcast_object_list(ids, src=0)
    return ids[0]
