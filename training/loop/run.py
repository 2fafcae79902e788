"""One training run, top to bottom: ranks, data, model, engine, optimizer steps, checkpoints, export."""

from __future__ import annotations

import dataclasses
import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pixelprune.files import write_whole
from training.checkpoint.checkpointer import Checkpointer
from training.checkpoint.export import export_model, run_facts
from training.config.recipe import show
from training.config.settings import CheckpointSettings, Config
from training.data.loader import START, Answered, Cursor
from training.distributed.cores import use_threads
from training.distributed.engine import build_engine
from training.distributed.engine_protocol import Engine
from training.distributed.ranks import Ranks, join_ranks
from training.distributed.stopping import StopRequest
from training.errors import StopAskedError, UserError, side_write
from training.exit_codes import FINISHED, RESUMABLE
from training.loop.context import RunContext
from training.loop.continuation import Continuation, LearningRate, continuation_of
from training.loop.evaluations import Evaluations
from training.loop.feed import Feed, build_feed, prepare_settings, training_loader
from training.loop.folder_lock import FolderLock
from training.loop.journal import Journal
from training.loop.memory import MemoryPlan, plan_memory
from training.loop.start_table import print_start_table
from training.loop.step import SkipCounter, run_step
from training.model.attention import choose_attention
from training.model.loading import DTYPES, load_model, load_model_files_once, prepare_layers
from training.model.lora import add_adapters
from training.model.parameters import freeze_parts, set_learning_rates, trains_vision
from training.model.sharing import check_layers_of_prefix, check_sharing
from training.model.supervised import SupervisedModel
from training.on_policy.own_answers import OwnAnswers
from training.teacher.files import TeacherPlan, plan_teacher
from training.teacher.teachers import build_teacher
from training.tracking.meter import StepMeter
from training.tracking.other_mirrors import check_installed
from training.tracking.provenance import describe_provenance

logger = logging.getLogger(__name__)


def run(config: Config) -> int:
    """Train as the config says, from the newest checkpoint or the start to the exported model.

    Every rank calls this. Returns the exit code: FINISHED, or RESUMABLE after a requested stop.
    """
    folder = Path(config.run.folder) / config.run.name
    stop = StopRequest(folder)
    ranks = join_ranks(config.distributed.timeout_minutes)
    if not ranks.has_launcher:  # before the folder is touched and the data indexed
        raise UserError(
            "training needs a launcher: `python -m launch RECIPE --ranks 1`, "
            "`deepspeed --module training.train RECIPE` or `torchrun -m training.train RECIPE`"
        )
    check_installed(config.tracking)
    with _set_up(config, ranks, folder):
        try:
            return _train(RunContext(config, ranks, folder, load_model_files_once(config.model, ranks), stop))
        except StopAskedError:
            _say_stopped(ranks, "in its preparations")
            return RESUMABLE


def _train(context: RunContext) -> int:
    config, ranks, folder, files = context.config, context.ranks, context.folder, context.files
    facts = {"config.yaml": show(config), "environment.json": describe_provenance()}
    checkpointer = Checkpointer(folder, config.checkpoint, ranks, facts)
    continuation = continuation_of(context, checkpointer)
    teacher_plan = plan_teacher(config.kd, config.model, config.loss, prepare_settings(config, files), files, ranks)
    feed = build_feed(context, config.data.sources, shuffle=True, teacher_plan=teacher_plan)
    num_steps = feed.num_steps(config.schedule)
    is_finished = continuation.newest is not None and continuation.state.step >= num_steps
    state = continuation.state if is_finished else continuation.going_on
    cursor = _cursor(context, feed, continuation)
    evaluations = Evaluations(context, num_steps)

    if context.is_stopping():
        raise StopAskedError
    engine, attention, memory = _build(context, teacher_plan)
    model = engine.module.model
    if continuation.newest:
        checkpointer.load(engine, continuation.newest)
    learning_rate = LearningRate(config.schedule, num_steps, state)
    journal = Journal(context, num_steps, state)
    if ranks.is_first:
        print_start_table(context, feed, model, attention, memory, num_steps, state.step)
    ranks.from_first(lambda: _say_what_comes(folder, config, learning_rate, state.step, is_finished))

    meter = StepMeter(ranks, state.totals)
    is_interrupted = evaluations.catch_up(engine, state.step, journal)
    if is_interrupted or (state.step == 0 and context.is_stopping()):
        journal.close()
        _say_stopped(ranks, f"after step {state.step}, saved" if state.step else "before the first step")
        return RESUMABLE
    # The ranks of a sharded teacher fetch its layers together: each needs an image when one has.
    dummy = trains_vision(model) or config.kd.sharding == "zero3"
    first = state.step
    answered = _own_answers(context, model, meter)
    loader = training_loader(
        context, feed, num_steps=num_steps, cursor=cursor, first_step=first, dummy_image=dummy, answered=answered
    )
    skips = SkipCounter(config.optim.max_skipped_in_a_row, state.num_skipped)
    for step, batches in loader.steps():
        learning_rates = set_learning_rates(engine.optimizer, learning_rate.factor(step))
        outcome = run_step(engine, batches, meter)
        skips.count(engine, outcome, step)
        metrics = meter.finish()
        metrics |= {"grad_norm": float(engine.get_global_grad_norm()), "num_skipped": skips.total}
        metrics |= {f"lr_{part}": rate for part, rate in learning_rates.items()}
        num_done = step + 1
        journal.stepped(num_done, metrics)

        stopping, failed = ranks.any_of(context.is_asked_to_stop, checkpointer.has_failed)
        if failed:
            _report_failed_save(checkpointer, config.checkpoint)
        state = dataclasses.replace(
            state,
            step=num_done,
            cursor=outcome.cursor,
            totals=dataclasses.replace(meter.totals),
            num_skipped=skips.total,
            order=feed.order,
            **learning_rate.state(step),
        )
        every = config.checkpoint.every_steps
        is_due = num_done == num_steps or bool(every and num_done % every == 0)
        if is_due:
            checkpointer.save(engine, state)
        if stopping or evaluations.after(engine, num_done, journal):
            if not is_due:
                checkpointer.save(engine, state)
            journal.close()
            saved = "saved" if _is_saved_everywhere(checkpointer, ranks, config) else "NOT saved"
            _say_stopped(ranks, f"after step {num_done}, {saved}")
            return RESUMABLE
    checkpointer.finish()
    if ranks.is_first and config.checkpoint.export_at_end:
        used = continuation.trained_with(config) if is_finished else config
        path = export_model(folder / "export", model, files, used, run_facts(folder, state))
        logger.info("model written to %s", path)
    journal.close()
    return FINISHED


def _build(context: RunContext, teacher_plan: TeacherPlan | None) -> tuple[Engine, str, MemoryPlan]:
    """The model as it is trained, in its engine; the attention that was chosen; what of memory is planned."""
    config, ranks = context.config, context.ranks
    attention = choose_attention(config.model.attention, ranks.device, DTYPES[config.model.dtype])
    if ranks.is_first:
        logger.info("loading the weights of %s, optimizer states follow", config.model.path)
    check_sharing(config.data.share_prefix, context.files.config, attention)
    model = load_model(config.model, attention=attention, device=ranks.device)
    freeze_parts(model, config.optim)
    add_adapters(model, config.lora)
    memory = plan_memory(context, model, attention, teacher_plan)
    shares_prefix = config.data.share_prefix != "off"
    layers = memory.applied_to(config.model)
    check_layers_of_prefix(config.data.share_prefix, context.files.config, layers)
    prepare_layers(model, layers, ranks.device, shares_prefix=shares_prefix)
    teacher = build_teacher(
        config.kd, config.model, config.loss, teacher_plan, ranks, attention, config.data.share_prefix
    )
    module = SupervisedModel(model, context.files.geometry, config.loss, teacher)
    return build_engine(module, ranks, config.distributed, config.optim, config.model.dtype), attention, memory


def _own_answers(context: RunContext, model: Any, meter: StepMeter) -> Answered | None:
    """What lets the student answer its samples itself; None without kd.on_policy."""
    config, ranks = context.config, context.ranks
    if not config.kd.on_policy:
        return None
    own = OwnAnswers(config.kd, model, context.prompter(), meter, seed=config.run.seed, rank=ranks.rank)
    return own.answered


def _cursor(context: RunContext, feed: Feed, continuation: Continuation) -> Cursor:
    """Where the data of the run goes on."""
    if continuation.newest is None:
        return START
    state = continuation.state
    return feed.continued(state.cursor, state.order, context.config.checkpoint.on_changed_data)


def _say_what_comes(folder: Path, config: Config, learning_rate: LearningRate, step: int, is_finished: bool) -> None:
    """What the first rank says before the first step; from here on the folder's recipe is the present one."""
    if is_finished:
        length = f"{learning_rate.num_steps} steps are all that the recipe asks for"
        logger.info("run %s is finished: step %d is done, %s. Nothing is trained.", config.run.name, step, length)
        return
    with side_write("the recipe in the run's folder", go_on=config.checkpoint.on_error == "continue"):
        write_whole(folder / "config.yaml", show(config).encode())
    if learning_rate.said:
        logger.warning(learning_rate.said)


def _say_stopped(ranks: Ranks, where: str) -> None:
    """The last line of a run that was asked to stop, whatever it was at."""
    if ranks.is_first:
        logger.info("stopped %s; start again to continue", where)


def _report_failed_save(checkpointer: Checkpointer, settings: CheckpointSettings) -> None:
    """End the run, or go on, on all ranks alike after a save that failed on one of them (checkpoint.on_error)."""
    checkpointer.finish()
    if settings.on_error == "stop":
        raise UserError("saving a checkpoint failed on another rank, which says why (checkpoint.on_error)")


def _is_saved_everywhere(checkpointer: Checkpointer, ranks: Ranks, config: Config) -> bool:
    """Wait for the save on all ranks: the launcher kills the others 30 s after the first that leaves with a code."""
    checkpointer.wait()
    ranks.barrier(config.distributed.timeout_minutes + config.checkpoint.save_timeout_minutes)
    failed = ranks.any(checkpointer.has_failed)
    if failed:
        _report_failed_save(checkpointer, config.checkpoint)
    return not failed


@contextmanager
def _set_up(config: Config, ranks: Ranks, folder: Path) -> Iterator[None]:
    """Threads, seeds and the run's folder, locked against a second run.

    `python -m launch` holds a lock of its own from start to restart; this one covers starts without it.
    """
    if ranks.device.type == "cpu":
        use_threads(config.distributed.threads_per_rank, ranks.cores_per_rank)
    seed = config.run.seed + ranks.rank
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    lock = FolderLock(folder, "train.lock")

    try:
        ranks.from_first(lock.acquire)
        yield
    finally:
        lock.release()
