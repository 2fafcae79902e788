"""Runs on every rank of test_kd.py: whole training runs with a teacher, each as a recipe and its overrides."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import deepspeed
import torch
import xxhash
from safetensors.torch import load_file

import training.loop.run
from tests.ranks import without_launcher_arguments
from training.config.recipe import load_recipe
from training.config.settings import Config
from training.data.targets import TargetReader
from training.distributed.ranks import join_ranks, leave_ranks
from training.errors import UserError
from training.exit_codes import leave_process
from training.loop.feed import prepare_settings
from training.loop.teacher_cache import build_cache
from training.model.loading import load_model_files
from training.model.parameters import part_of
from training.teacher.files import plan_teacher
from training.tracking.tracker import read_metrics

LOSSES = ("loss", "ce", "kl", "teacher_agreement", "teacher_entropy", "token_accuracy", "grad_norm", "num_supervised")
NUM_STEPS = 4


class Scenarios:
    """Runs in one folder, with a small data set and a toy model."""

    def __init__(self, folder: Path, model_path: str, data: str):
        self.folder = folder
        self.ranks = join_ranks()
        self.common = [
            f"model.path={model_path}", f"run.folder={folder}", f"data.sources.0.path={data}",
            "data.eval_sources=[]", f"data.index_dir={folder}/index", "data.index_workers=1", "resize.min_pixels=1024",
            "data.samples_per_step=6", f"schedule.max_steps={NUM_STEPS}", "distributed.threads_per_rank=1",
            f"kd.cache_dir={folder}/cache",
        ]  # fmt: skip
        self.teachers: list = []
        build = training.loop.run.build_teacher

        def remember(*arguments):
            self.teachers.append(build(*arguments))
            return self.teachers[-1]

        training.loop.run.build_teacher = remember

    def config(self, name: str, *overrides: str, recipe: str = "kd_recovery_debug") -> Config:
        return load_recipe(f"configs/{recipe}.yaml", [*self.common, f"run.name={name}", *overrides])

    def train(self, name: str, *overrides: str, recipe: str = "kd_recovery_debug") -> dict:
        """Losses of every step and a hash of the exported weights."""
        training.loop.run.run(self.config(name, *overrides, recipe=recipe))
        if not self.ranks.is_first:
            return {}
        folder = self.folder / name
        steps = [{key: row[key] for key in LOSSES} for row in read_metrics(folder)]
        weights = xxhash.xxh3_64((folder / "export" / "model.safetensors").read_bytes()).hexdigest()
        return {"steps": steps, "weights": weights}

    def changed_parts(self, name: str, *overrides: str) -> list[str]:
        """Parts of the model whose exported weights are not those of the start."""
        config = self.config(name, *overrides)
        training.loop.run.run(config)
        start = load_file(Path(config.model.path) / "model.safetensors")
        end = load_file(self.folder / name / "export" / "model.safetensors")
        assert start.keys() == end.keys()
        return sorted({part_of(key) for key in start if not torch.equal(start[key], end[key])})

    def resume_half(self, name: str, *overrides: str) -> dict:
        """The run `name` as it was after step 2, run to the end again under another name."""
        other = f"{name}_resumed"
        if self.ranks.is_first:
            shutil.copytree(self.folder / name, self.folder / other)
            shutil.rmtree(self.folder / other / "export")
            shutil.rmtree(self.folder / other / "checkpoints" / f"step-{NUM_STEPS:08d}")
        self.ranks.barrier()
        return self.train(other, *overrides)

    def cache(self, *overrides: str) -> Path:
        return build_cache(self.config("cache", *overrides), self.ranks)


def watch_initialize() -> list[dict]:
    """What is on this rank's device of every model that is handed to ZeRO-3, at that moment; whole numbers."""
    initialize, found = deepspeed.initialize, []

    def watched(*, model, config, **rest):
        if config["zero_optimization"]["stage"] == 3:
            parameters = list(model.parameters())
            found.append(
                {
                    "whole": sum(parameter.numel() for parameter in parameters),
                    "shares": sum(parameter.ds_tensor.numel() for parameter in parameters),
                    "all": sum(parameter.ds_numel for parameter in parameters),
                }
            )
        return initialize(model=model, config=config, **rest)

    deepspeed.initialize = watched
    return found


def weights_of(teacher) -> str:
    digest = xxhash.xxh3_64()
    for _, tensor in sorted(teacher.model.state_dict().items()):
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def one_rank(run: Scenarios) -> dict:
    results = {
        "ce": run.train("ce", recipe="debug"),
        "kd_weight 0": run.train("kd0", "loss.kd_weight=0", "loss.temperature=3", "kd.sharding=zero3"),
        "no pruning": run.train("same", "prune.strategy=none"),
    }
    singly = ("data.samples_per_step=1", "checkpoint.every_steps=2")
    results["online, singly"] = run.train("online", *singly)
    results["resumed online"] = run.resume_half("online", *singly)
    fresh = run.teachers[-1]
    results["teacher weights"] = [weights_of(teacher) for teacher in run.teachers if teacher is not None]
    assert fresh is not run.teachers[-2], "a resumed run builds its own teacher"
    cached = ("kd.source=cached", "kd.cache_records=5")
    try:
        run.train("cached", *singly, *cached)
    except UserError as error:
        results["without a cache"] = str(error)
    # Computed in packs of one record each, as the runs above train on them.
    alone = (*singly, "kd.source=cached", "kd.cache_records=1", f"kd.cache_dir={run.folder}/cache_of_single_records")
    run.cache(*alone)
    results["cached, singly"] = run.train("cached", *alone)
    results["resumed cached"] = run.resume_half("cached", *alone)
    folder = run.cache(*cached)
    results["cached, packed"] = run.train("cached_packed", *cached)
    results["online, packed"] = run.train("online_packed")
    results["online, small packs"] = run.train("online_small", "data.pack_tokens=130")
    results["repair"] = repair(run, folder, cached)
    results["sessions"] = sessions(run)
    results["changed"] = {
        "vit frozen": run.changed_parts("vit_frozen", "optim.vit.freeze=true"),
        "llm frozen": run.changed_parts("llm_frozen", "optim.llm.freeze=true"),
        "adapters on the llm": run.changed_parts("adapters", "lora.rank=4"),
        "adapters on the llm, cached": run.changed_parts("adapters_cached", "lora.rank=4", *cached),
    }
    return results


def repair(run: Scenarios, folder: Path, cached: tuple[str, ...]) -> dict:
    """Lose a shard, be told so, build again: only what is missing is computed."""
    shards = sorted(folder.glob("shard-*"))
    stamps = {shard: shard.stat().st_mtime_ns for shard in shards}
    shards[0].unlink()
    (folder / "shard-0.123.partial").write_bytes(b"half")
    num_left, message = len(TargetReader(folder)), ""
    try:
        run.train("broken", *cached)
    except UserError as error:
        message = str(error)
    run.cache(*cached)
    kept = [shard for shard in stamps if shard.exists() and shard.stat().st_mtime_ns == stamps[shard]]
    return {
        "message": message,
        "num_shards": len(stamps),
        "num_untouched": len(kept),
        "num_left": num_left,
        "num_after": len(TargetReader(folder)),
        "partials": [path.name for path in folder.glob("*.partial")],
    }


def sessions(run: Scenarios) -> dict[str, dict]:
    """Screenshots predicted from each other, the teacher's pixels decoded from them; cut after step 2; cached."""
    walks = ("prune.strategy=pred3d", "data.last_turn_only=true", "checkpoint.every_steps=2",
             f"data.sources.0.path={Path(run.common[2].partition('=')[2]).with_name('walks.jsonl')}")  # fmt: skip
    results = {"online": run.train("sessions", *walks), "resumed": run.resume_half("sessions", *walks)}
    cached = (*walks, "kd.source=cached", f"kd.cache_dir={run.folder}/cache_of_sessions")
    run.cache(*cached)
    results["cached"] = run.train("sessions_cached", *cached)
    if run.ranks.is_first:
        results["pruned"] = json.loads((run.folder / "sessions" / "export" / "pixelprune.json").read_text())["prune"]
    return results


def two_ranks(run: Scenarios) -> dict:
    cached = ("kd.source=cached", "kd.cache_records=4")
    results = {"online, packed": run.train("online"), "sessions": sessions(run)}
    folder = run.cache(*cached)
    results["cached, packed"] = run.train("cached", *cached)
    results["num_cached"] = len(TargetReader(folder))
    handed_over, linear = watch_initialize(), torch.nn.functional.linear
    results["sharded"] = run.train("sharded", "kd.sharding=zero3", "optim.vit.freeze=true", "optim.merger.freeze=true")
    results["handed over"] = handed_over
    results["linear is torch's"] = torch.nn.functional.linear is linear
    results["replica, vision frozen"] = run.train("frozen", "optim.vit.freeze=true", "optim.merger.freeze=true")
    sharded = run.cache("kd.sharding=zero3", f"kd.cache_dir={run.folder}/sharded_cache")
    results["num_cached_sharded"] = len(TargetReader(sharded))
    config = run.config("cache", *cached)
    student = load_model_files(config.model)
    prepare = prepare_settings(config, student)
    again = plan_teacher(config.kd, config.model, config.loss, prepare, student, run.ranks)
    assert again is not None
    assert again.targets is not None
    results["same folder on both ranks"] = str(again.targets.folder) == str(folder)
    return results


def main() -> None:
    out, model_path, data = without_launcher_arguments(sys.argv[1:])
    torch.set_num_threads(1)
    run = Scenarios(Path(out).with_suffix(""), model_path, data)
    results = one_rank(run) if run.ranks.world_size == 1 else two_ranks(run)
    if run.ranks.is_first:
        Path(out).write_text(json.dumps(results))
    leave_ranks()
    leave_process(0)


if __name__ == "__main__":
    main()
