"""What a run is fed: the index of its data, the plan over it, and the loaders for training and validation."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from pixelprune.flops import CostModel
from training.config import Config
from training.data.index import Index
from training.data.index_builder import build_index
from training.data.plan import PlanInput, PlanSettings, num_steps
from training.data.prepare import PrepareSettings
from training.data.settings import SourceSettings
from training.engine import Ranks
from training.errors import UserError
from training.model import ModelFiles


@dataclass(frozen=True)
class Feed:
    """Checked records and the inputs of their plan."""

    index: Index
    prepare: PrepareSettings
    plan_input: PlanInput
    plan_settings: PlanSettings

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
    config: Config, sources: list[SourceSettings], files: ModelFiles, ranks: Ranks, folder: Path, *, shuffle: bool
) -> Feed:
    """Index the sources (all ranks together), refuse too much bad data, and set up the plan.

    Raises UserError for anything about the data that the user must mend.
    """
    data = config.data
    prepare = PrepareSettings(files.path, config.prune, config.resize, data.last_turn_only)
    workers = data.index_workers or max(1, (os.cpu_count() or 1) // ranks.world_size_per_node)
    try:
        index = build_index(
            sources,
            prepare,
            index_dir=data.index_dir,
            num_workers=workers,
            rank=ranks.rank,
            world_size=ranks.world_size,
            barrier=dist.barrier,
            show_progress=ranks.is_first,
        )
        report = folder / f"quarantine{'' if shuffle else '_eval'}.jsonl"
        index = index.checked(data, report, write_report=ranks.is_first)
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
    return Feed(index, prepare, index.plan_input(cost), plan_settings)
