"""What a run is fed: the index of its data, the plan over it, and the loaders for training and validation."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch.distributed as dist

from pixelprune.flops import CostModel
from training.config import Config
from training.data.index import Index
from training.data.index_builder import build_index
from training.data.plan import PlanInput, PlanSettings, num_steps
from training.data.prepare import PrepareSettings
from training.data.settings import SourceSettings
from training.data.targets import BUILD_ADVICE, TargetReader
from training.engine import Ranks
from training.errors import UserError
from training.model import ModelFiles
from training.teacher_files import Teaching


@dataclass(frozen=True)
class Feed:
    """Checked records and the inputs of their plan."""

    index: Index
    prepare: PrepareSettings
    plan_input: PlanInput
    plan_settings: PlanSettings
    targets: TargetReader | None = None

    def num_steps(self, config: Config) -> int:
        """Optimizer steps of the whole run: schedule.max_steps, or the epochs' steps."""
        if config.schedule.max_steps:
            return config.schedule.max_steps
        whole, part = divmod(config.schedule.epochs, 1)
        steps = [num_steps(self.plan_input, self.plan_settings, epoch) for epoch in range(int(whole) + (part > 0))]
        if part:
            steps[-1] = max(1, round(steps[-1] * part))
        return sum(steps)


def build_feed(
    config: Config,
    sources: list[SourceSettings],
    files: ModelFiles,
    ranks: Ranks,
    folder: Path,
    *,
    shuffle: bool,
    teaching: Teaching | None = None,
) -> Feed:
    """Index the sources (all ranks together), refuse too much bad data, and set up the plan.

    teaching: packs bring the teacher's side with them. The records are then those that fit unpruned too, with a cached
    teacher as with an online one: the two train on the same samples.
    Raises UserError for anything about the data that the user must mend.
    """
    data = config.data
    prepare = PrepareSettings(files.path, config.prune, config.resize, data.last_turn_only)
    try:
        index = build_index(
            sources,
            prepare,
            index_dir=data.index_dir,
            num_workers=data.index_workers or ranks.cores_per_rank,
            rank=ranks.rank,
            world_size=ranks.world_size,
            barrier=dist.barrier,
            show_progress=ranks.is_first,
        )
        report = folder / f"quarantine{'' if shuffle else '_eval'}.jsonl"
        index = index.checked(data, report, with_teacher=teaching is not None, write_report=ranks.is_first)
    except ValueError as error:
        raise UserError(str(error)) from error
    cost = CostModel.from_config(files.config)
    plan_settings = PlanSettings(
        samples_per_step=data.samples_per_step,
        pack_tokens=data.pack_tokens,
        pack_patches=data.pack_patches,
        shuffle=shuffle and data.shuffle,
        seed=config.run.seed,
    )
    if teaching is None:
        return Feed(index, prepare, index.plan_input(cost), plan_settings)
    if teaching.targets is not None:
        _require_targets(index, teaching.targets)
        return Feed(index, prepare, index.plan_input(cost), plan_settings, teaching.targets)
    plan_input = index.plan_input(cost, with_teacher=True, teacher_cost=CostModel.from_config(teaching.files.config))
    return Feed(index, dataclasses.replace(prepare, with_full=True), plan_input, plan_settings)


def _require_targets(index: Index, targets: TargetReader) -> None:
    """UserError unless the cache holds every record."""
    missing = np.flatnonzero(~targets.has(index.content_hash))
    if len(missing):
        raise UserError(
            f"{len(missing)} of {len(index)} records have no teacher targets in {targets.folder}, the first is "
            f"{index.record_id(int(missing[0]))!r}; {BUILD_ADVICE}, or set kd.source=online"
        )
