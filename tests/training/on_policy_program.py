"""Runs on every rank of test_on_policy.py: training runs whose student answers some of its samples itself."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

import training.loop.run
from pixelprune.pack import Pack
from tests.ranks import without_launcher_arguments
from tests.training.kd_program import NUM_STEPS, Scenarios
from training.distributed.ranks import leave_ranks
from training.exit_codes import leave_process
from training.tracking.tracker import read_metrics

OWN = ("data.samples_per_step=4", "kd.on_policy_max_new_tokens=6", "checkpoint.every_steps=2")


class Watched:
    """What the ranks trained on: ids and lengths of every pack that went through the loop."""

    def __init__(self) -> None:
        self.packs: list[dict] = []
        step = training.loop.run.run_step

        def watched(engine, batches, meter):
            return step(engine, map(self.seen, batches), meter)

        training.loop.run.run_step = watched

    def seen(self, batch):
        pack: Pack = batch.pack
        assert pack.labelled is not None
        self.packs.append(
            {
                "ids": pack.input_ids.tolist(),
                "labels": pack.labels.tolist(),
                "full_labels": pack.full.labels.tolist(),
                "labelled": pack.labelled.tolist(),
                "samples": [
                    (record_id, labelled.tolist())
                    for record_id, labelled in zip(
                        pack.record_ids, pack.labelled.split(pack.num_supervised_per_sample), strict=True
                    )
                ],
                "num_supervised": batch.num_supervised,
                "loss_weight": batch.loss_weight,
                "step": batch.step,
            }
        )
        return batch

    def take(self) -> list[dict]:
        packs, self.packs = self.packs, []
        return packs


def rows(run: Scenarios, name: str) -> list[dict]:
    return read_metrics(run.folder / name) if run.ranks.is_first else []


def main() -> None:
    out, model_path, data = without_launcher_arguments(sys.argv[1:])
    torch.set_num_threads(1)
    run, watched, results = Scenarios(Path(out).with_suffix(""), model_path, data), Watched(), {}

    def train(name: str, *overrides: str) -> None:
        run.train(name, *OWN, *overrides)
        results[name] = {"packs": run.ranks.gather(watched.take()), "rows": rows(run, name)}

    train("half", "kd.on_policy=0.5", "loss.divergence=jsd")
    if run.ranks.world_size == 1:
        once = ("schedule.max_steps=1", "schedule.warmup_steps=0")
        train("same", "kd.on_policy=1", "loss.ce_weight=0", "prune.strategy=none", *once)
        run.resume_half("half", *OWN, "kd.on_policy=0.5", "loss.divergence=jsd")
        results["resumed"] = {"packs": [watched.take()], "rows": rows(run, "half_resumed")}
        results["weights"] = [
            (run.folder / name / "export" / "model.safetensors").read_bytes().hex()[-4000:]
            for name in ("half", "half_resumed")
        ]
        folder = run.folder / "half" / "checkpoints" / f"step-{NUM_STEPS:08d}"
        sizes = {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}
        results["bytes"] = {"checkpoint": sum(sizes.values()), "model": num_trained(model_path)}
    if run.ranks.is_first:
        Path(out).write_text(json.dumps(results))
    leave_ranks()
    leave_process(0)


def num_trained(model_path: str) -> int:
    """Weights of the student, each of which a checkpoint holds with two moments in float32."""
    from safetensors import safe_open

    with safe_open(Path(model_path) / "model.safetensors", framework="pt") as tensors:
        names = list(tensors.keys())
        return sum(tensors.get_tensor(name).numel() for name in names)


if __name__ == "__main__":
    main()
