"""This framework's own trainer on the records, as `python -m launch` would run it on one rank; steps are logged."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import step_log

from training.command import run_command
from training.config.recipe import load_recipe
from training.distributed.ranks import leave_ranks
from training.loop import run as loop
from training.loop.journal import Journal

RECIPE = Path(__file__).parents[4] / "configs" / "finetune.yaml"


def main() -> int:
    job = step_log.read_job()
    log = step_log.StepLog(job["log"])
    stepped = Journal.stepped

    def logged(self: Journal, num_done: int, metrics: dict[str, float]) -> None:
        stepped(self, num_done, metrics)
        log.stepped(num_done, metrics["loss"])

    loader = loop.training_loader

    def begins(*args: Any, **kwargs: Any) -> Any:
        log.begin()
        return loader(*args, **kwargs)

    Journal.stepped, loop.training_loader = logged, begins  # type: ignore[method-assign,assignment]
    records, out = Path(job["records"]), Path(job["out"])
    overrides = [
        f"model.path={job['model']}", "model.dtype=float32", "model.recompute_vit=0", "model.recompute_llm=0",
        f"data.sources.0.path={records}", f"data.index_dir={job['index_dir']}",
        "data.eval_sources=[]", f"data.samples_per_step={job['batch']}",
        "data.shuffle=false", "data.num_workers=0", f"prune.strategy={job['strategy']}",
        f"resize.min_pixels={job['min_pixels']}", f"resize.max_pixels={job['max_pixels']}",
        f"optim.lr={job['lr']}", "optim.weight_decay=0", "optim.beta2=0.999", f"schedule.max_steps={job['steps']}",
        "schedule.warmup_steps=0", "schedule.min_lr_ratio=1", f"checkpoint.every_steps={job['save_steps']}",
        "checkpoint.export_at_end=false", "eval.every_steps=0", "eval.at_start=false",
        f"distributed.threads_per_rank={job['threads']}", "tracking.wandb=disabled",
        f"run.folder={out.parent}", f"run.name={out.name}",
    ]  # fmt: skip
    Path(job["config"]).write_text(json.dumps(overrides, indent=2))
    code = loop.run(load_recipe(RECIPE, overrides))
    leave_ranks()
    return code


if __name__ == "__main__":
    sys.exit(run_command(main))
