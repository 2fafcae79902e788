"""The teacher's targets for a recipe's data, computed once by all ranks.

What is cached already is not computed again: a run that was killed goes on where it was, and new records are added.

    N = supervised tokens of a pack, D = the teacher's width, k = kd.top_k
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import nn

from pixelprune.command import ProgressLine, plain_console
from pixelprune.flops import CostModel
from pixelprune.model_folder import ModelFolder
from pixelprune.pack import Pack
from pixelprune.settings import PruneSettings
from training.config.settings import Config
from training.data.index import Index
from training.data.plan import plan_epoch
from training.data.targets import TargetEntry, TargetReader, write_shard
from training.distributed.cores import use_threads
from training.distributed.ranks import PATIENCE_MINUTES, Ranks
from training.errors import UserError
from training.loop.context import RunContext
from training.loop.feed import Feed, build_feed, prepare_settings, training_loader
from training.loop.folder_lock import FolderLock
from training.model.attention import choose_attention
from training.model.loading import DTYPES, load_model_files
from training.teacher.files import TeacherPlan, cache_folder, load_teacher_files, teacher_dtype
from training.teacher.teachers import OnlineTeacher, build_online_teacher
from training.teacher.top_k import TopK

logger = logging.getLogger(__name__)

GIB = 2**30
MOST_AT_ONCE = 64
"""Records of a rank whose pixels are in host memory at one time: the loader prepares so many before the first pack."""


def build_cache(config: Config, ranks: Ranks) -> Path:
    """Compute the targets that are missing and return their folder. Every rank calls this.

    Raises UserError: data that cannot be used, a teacher that does not fit, too little space on the disk.
    """
    if ranks.device.type == "cpu":
        use_threads(config.distributed.threads_per_rank, ranks.cores_per_rank)
    student = load_model_files(config.model)
    teacher_files = load_teacher_files(config.kd, config.model, student)
    prepare = prepare_settings(config, student)
    folder = cache_folder(config.kd, config.model, config.loss, prepare, teacher_files, student, ranks)
    lock = FolderLock(folder, "cache.lock")

    def clean_up() -> None:
        lock.acquire()
        for partial in folder.glob("*.partial"):
            partial.unlink()

    ranks.from_first(clean_up)
    context = RunContext(config, ranks, folder, student)
    feed = build_feed(context, config.data.sources, shuffle=True, teacher_plan=TeacherPlan(teacher_files))
    # The first rank's: another's view of a shared folder may be older.
    missing = ranks.from_first(lambda: _missing(feed.index, folder))
    console = plain_console(stderr=True, quiet=not ranks.is_first)
    console.print(f"teacher {teacher_files.path}: {feed.index.describe()}", soft_wrap=True)
    num_missing = int(missing.sum())
    console.print(f"{len(feed.index)} records, {num_missing} of them to compute; targets in {folder}", soft_wrap=True)
    if num_missing:
        todo = feed.index.subset(missing, [])
        _check_space(context, todo, teacher_files, console)
        attention = choose_attention(config.model.attention, ranks.device, teacher_dtype(config.kd, config.model))
        teacher = build_online_teacher(
            config.kd, config.model, teacher_files, ranks, attention, config.data.share_prefix
        )
        _compute(context, todo, feed, teacher, console)
    ranks.barrier(PATIENCE_MINUTES)
    if ranks.is_first:
        lock.release()
    console.print("all records have their targets: train with kd.source=cached", soft_wrap=True)
    return folder


def target_bytes(config: Config, teacher: ModelFolder, num_supervised: int) -> int:
    """Size of the targets of that many supervised tokens."""
    if config.kd.top_k:
        return num_supervised * config.kd.top_k * (torch.float32.itemsize + torch.int32.itemsize)
    width = teacher.config.get_text_config().hidden_size  # type: ignore[attr-defined]
    return num_supervised * width * _stored_dtype(config).itemsize


def target_values(pack: Pack, teacher: OnlineTeacher, config: Config) -> dict[str, torch.Tensor]:
    """What is stored for a full row: `hidden` (N, D), or `log_probs` (N, k) and `ids` (N, k); on the CPU."""
    return stored_values(teacher.hidden(pack), teacher.head, config)


def stored_values(hidden: torch.Tensor, head: nn.Module, config: Config) -> dict[str, torch.Tensor]:
    """As `target_values`, of final hidden states (N, D) that are there already, and the teacher's output head."""
    if not config.kd.top_k:
        return {"hidden": hidden.to(_stored_dtype(config)).cpu()}
    device = next(head.parameters()).device
    log_probs, ids = TopK(config.kd.top_k, config.loss).of(hidden.to(device), head)
    return {"log_probs": log_probs.cpu(), "ids": ids.cpu()}


def _stored_dtype(config: Config) -> torch.dtype:
    return DTYPES[config.kd.cache_dtype or config.kd.dtype or config.model.dtype]


def _missing(index: Index, folder: Path) -> np.ndarray:
    """bool (n,): one record of every content that has no target yet."""
    first = np.zeros(len(index), dtype=bool)
    first[np.unique(index.content_hash, return_index=True)[1]] = True
    return first & ~TargetReader(folder).has(index.content_hash)


def _check_space(context: RunContext, todo: Index, teacher: ModelFolder, console: Console) -> None:
    config, folder = context.config, context.folder
    num_supervised = int(todo.num_supervised.sum())
    needed = target_bytes(config, teacher, num_supervised)
    free = context.ranks.from_first(lambda: shutil.disk_usage(folder).free)
    values = f"{config.kd.top_k} log-probabilities" if config.kd.top_k else "a hidden state"
    console.print(
        f"size: {num_supervised:,} supervised tokens with {values} each take {needed / GIB:.3f} GiB, "
        f"{free / GIB:.1f} GiB are free",
        soft_wrap=True,
    )
    if needed > free:
        raise UserError(
            f"kd.cache_dir: the targets take {needed / GIB:.1f} GiB and {folder} has {free / GIB:.1f} GiB free; choose "
            "another disk, kd.cache_dtype=bfloat16, or kd.top_k=64 for log-probabilities in place of hidden states"
        )


def _compute(context: RunContext, todo: Index, feed: Feed, teacher: OnlineTeacher, console: Console) -> None:
    """Every rank writes a shard for each kd.cache_records of its records, and one for the rest."""
    config, ranks = context.config, context.ranks
    full_only = dataclasses.replace(todo, kept_blocks=todo.full_blocks)
    inputs = full_only.plan_input(CostModel.from_config(teacher.model.config))
    inputs = dataclasses.replace(inputs, copies=np.ones(len(inputs)))
    num_at_once = min(config.kd.cache_records, MOST_AT_ONCE) * ranks.world_size
    settings = dataclasses.replace(feed.plan_settings, samples_per_step=num_at_once, shuffle=False)
    prepare = dataclasses.replace(feed.prepare, prune=PruneSettings(strategy="none"), with_full=False)
    plan = plan_epoch(inputs, settings, epoch=0, world_size=ranks.world_size)
    hash_of = {todo.record_id(i): int(todo.content_hash[i]) for i in range(len(todo))}
    loader = training_loader(context, Feed(todo, prepare, inputs, settings), num_steps=len(plan))
    started, entries = time.perf_counter(), []
    with ProgressLine("teacher, records", len(todo), is_shown=ranks.is_first, console=console) as progress:
        for step, batches in loader.steps():
            for batch in batches:
                pack = batch.pack.to(ranks.device)
                entries += _entries(pack, target_values(pack, teacher, config), hash_of)
            if len(entries) >= config.kd.cache_records or (entries and step == len(plan) - 1):
                write_shard(context.folder, entries)
                entries = []
            progress.advance(plan[step].num_samples)
            if step == 0 and len(plan) > 1:
                share = float(plan[0].cost.sum() / inputs.cost.sum())
                minutes = (time.perf_counter() - started) / share / 60
                progress.say(f"time: about {minutes:.1f} minutes in all, from the first {plan[0].num_samples} records")


def _entries(pack: Pack, values: dict[str, torch.Tensor], hash_of: dict[str, int]) -> list[TargetEntry]:
    """The pack's values cut by record; the dummy has nothing supervised and no hash."""
    labels = pack.labels.cpu().numpy()
    entries, start = [], 0
    for record_id, num in zip(pack.record_ids, pack.num_supervised_per_sample, strict=True):
        rows = slice(start, start + num)
        if num:
            entries.append(
                TargetEntry(hash_of[record_id], labels[rows], {name: value[rows] for name, value in values.items()})
            )
        start += num
    return entries
