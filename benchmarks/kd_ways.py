"""Which way back for a pruned model: labels, the full-token teacher, its answers, or the student's own? Toy weights.

    python -m benchmarks.kd_ways [--seeds 6] [--folder runs/kd_ways]

A toy Qwen3-VL is trained on all tokens on a broad task (two questions about crops of many pages: the Full model).
Pruned without training it loses one of the two questions. It is then trained on pruned inputs, through the framework's
own trainer, on recovery data of four kinds: right (both questions, right labels), noisy (the same prompts, 40 % of the
labels wrong), bare (the same prompts, no labels at all) and narrow (few records of one question on two pages, right
labels). Each way tries the same learning rates and takes the one that is best on a validation split, over the seeds
that are tuned on; what is shown is accuracy on other, held-out screens of the broad task. A cell (one training of one
seed) takes about 20 seconds, a Full model 45; cells that are done are not done again. One thread.
"""

import argparse
import json
import logging
import shutil
import sys
import time
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.parts.kd_ways_report import FULL, PRUNED, best_lr, plot, tables
from benchmarks.parts.one_rank import is_rank, run_as_rank
from benchmarks.parts.panels import make_model, make_records
from benchmarks.parts.record import RESULTS, write_record
from pixelprune.pack import VisionGeometry, pack_samples
from pixelprune.prompter import Prompter
from pixelprune.records.prepare import PrepareSettings
from pixelprune.settings import PruneSettings
from training.answers.answer_files import AnswerFiles
from training.answers.answer_pass import AnswerPass, PassSettings
from training.answers.generating import Sampling
from training.config.recipe import load_recipe
from training.config.settings import Config
from training.data.settings import SourceSettings
from training.data.sources import open_sources
from training.distributed.ranks import Ranks, join_ranks
from training.loop.run import run
from training.loss.supervised import LossSettings
from training.model.loading import load_model
from training.model.supervised import SupervisedModel

LRS = (5e-4, 1e-3, 2e-3)
CE, KD = ("loss.kd_weight=0",), ("loss.ce_weight=0", "loss.kd_weight=1")
BOTH = ("loss.ce_weight=1", "loss.kd_weight=1")
OWN = (*KD, "kd.on_policy=1", "kd.on_policy_max_new_tokens=3")
WAYS: dict[tuple[str, str], tuple[str, ...]] = {
    ("right", "CE"): CE,
    ("noisy", "CE"): CE,
    ("noisy", "KD"): KD,
    ("noisy", "CE + KD"): BOTH,
    ("bare", "teacher's answers"): CE,
    ("bare", "on-policy"): OWN,
    ("narrow", "CE"): CE,
    ("narrow", "KD"): KD,
    ("narrow", "CE + KD"): BOTH,
}
"""(recovery data, way) -> what the recipe says of the loss."""
COMMON = [
    "data.pack_tokens=1024", "data.pack_patches=4096", "data.index_workers=1", "data.num_workers=0",
    "resize.min_pixels=1024", "resize.max_pixels=65536", "distributed.threads_per_rank=1", "model.recompute_vit=0",
    "model.recompute_llm=0", "tracking.log_every=10", "model.check_attention=false", "data.eval_sources=[]",
]  # fmt: skip


def recipe(folder: Path, model: Path, data: str, name: str, *overrides: str) -> Config:
    """The debug twin of configs/kd_recovery.yaml on records of the task."""
    paths = [f"model.path={model}", f"run.folder={folder}/runs", f"run.name={name}", f"data.index_dir={folder}/index",
             f"data.sources.0.path={data}", f"data.sources.0.root={folder}"]  # fmt: skip
    return load_recipe("configs/kd_recovery_debug.yaml", [*paths, *COMMON, *overrides])


def train(config: Config) -> Path:
    """Train from the beginning; the exported model."""
    folder = Path(config.run.folder) / config.run.name
    shutil.rmtree(folder, ignore_errors=True)
    run(config)
    return folder / "export"


class Screens:
    """Held-out records, prepared once for each strategy."""

    def __init__(self, folder: Path, model: Path):
        self.folder, self.model = folder, model
        self.samples: dict[tuple[str, str], list] = {}

    def prepared(self, split: str, strategy: str) -> list:
        if (split, strategy) not in self.samples:
            config = recipe(self.folder, self.model, str(self.folder / f"{split}.jsonl"), "held-out")
            preparer = PrepareSettings(str(self.model), PruneSettings(strategy), config.resize).build()
            lines = (self.folder / f"{split}.jsonl").read_text().splitlines()
            self.samples[split, strategy] = [preparer.prepare(json.loads(line), self.folder).sample for line in lines]
        return self.samples[split, strategy]

    @torch.no_grad()
    def accuracy(self, model_path: Path, split: str, strategy: str) -> float:
        """Share of records whose most probable first token is the answer's: answers are one token."""
        config = recipe(self.folder, model_path, "unused", "held-out")
        model = load_model(config.model, attention="sdpa", device=torch.device("cpu")).eval()
        geometry = VisionGeometry.from_config(model.config)
        module = SupervisedModel(model, geometry, LossSettings()).eval()
        samples, num_right = self.prepared(split, strategy), 0
        for start in range(0, len(samples), 64):
            pack = pack_samples(samples[start : start + 64], geometry)
            top1 = model.lm_head(module.hidden_at_supervised(pack)).argmax(-1)
            sizes = list(pack.num_supervised_per_sample)
            firsts = zip(top1.split(sizes), pack.labels.split(sizes), strict=True)
            num_right += sum(int(top[0] == label[0]) for top, label in firsts)
        return num_right / len(samples)


class Cells:
    """What was measured, a file each: a benchmark that is started again goes on where it was."""

    def __init__(self, folder: Path, settings: dict, ranks: Ranks):
        self.folder, self.settings, self.ranks = folder, settings, ranks
        (folder / "cells").mkdir(parents=True, exist_ok=True)
        path = folder / "settings.json"
        if path.exists() and json.loads(path.read_text()) != settings:
            raise SystemExit(f"{folder} holds cells made with other settings: {path}; give another --folder")
        path.write_text(json.dumps(settings))

    def full(self, seed: int) -> Path:
        export = self.folder / "runs" / f"full-{seed}" / "export"
        if not (export / "model.safetensors").exists():
            start = make_model(self.folder / f"start-{seed}", seed)
            s = self.settings
            long = [
                f"schedule.max_steps={s['full_steps']}",
                f"schedule.warmup_steps={min(10, s['full_steps'])}",
                f"optim.lr={s['full_lr']}",
            ]
            none = ["prune.strategy=none", "loss.kd_weight=0", "data.samples_per_step=32", f"run.seed={seed}"]
            train(recipe(self.folder, start, f"{self.folder}/full.jsonl", f"full-{seed}", *long, *none))
        return export

    def answers(self, seed: int) -> str:
        """The Full model's answers to the bare prompts, as `python -m training.answer` makes them."""
        out = self.folder / f"answers-{seed}"
        path = out / "answers" / "bare.jsonl"
        if not path.exists():
            model = load_model(self.config(seed).model, attention="sdpa", device=torch.device("cpu")).eval()
            resize = self.config(seed).resize
            prompter = Prompter.load(str(self.full(seed)), prune="none", resize=resize)
            sources = open_sources([SourceSettings(f"{self.folder}/bare.jsonl")])
            work = AnswerPass(model, prompter, sources, PassSettings(Sampling(max_new_tokens=3), batch_size=64))
            files = AnswerFiles(out, {"seed": seed}, work.num_parts)
            files.start()
            work.run(files, None, self.ranks, Console(quiet=True))
            files.join(["bare"])
        return str(path)

    def config(self, seed: int) -> Config:
        return recipe(self.folder, self.full(seed), "unused", "teacher")

    def cell(self, seed: int, data: str, way: str, lr: float) -> dict[str, float]:
        """Accuracies of one training on both splits, on pruned inputs."""
        name = f"{seed}-{data}-{''.join(letter for letter in way if letter.isalnum())}-{lr:g}"
        path = self.folder / "cells" / f"{name}.json"
        if not path.exists():
            full = self.full(seed)
            records = self.answers(seed) if data == "bare" else f"{self.folder}/{data}.jsonl"
            started = time.process_time()
            steps = self.settings["steps"]
            short = [f"schedule.max_steps={steps}", f"schedule.warmup_steps={min(5, steps)}", f"optim.lr={lr}"]
            config = recipe(self.folder, full, records, name, *short, f"run.seed={seed}", "data.samples_per_step=16",
                            *WAYS[data, way])  # fmt: skip
            model, screens = train(config), Screens(self.folder, full)
            found = {split: screens.accuracy(model, split, PRUNED) for split in ("val", "test")}
            path.write_text(json.dumps(found | {"cpu_seconds": time.process_time() - started}))
            shutil.rmtree(Path(config.run.folder) / name)
            print(name, json.loads(path.read_text()), flush=True)
        return json.loads(path.read_text())  # type: ignore[no-any-return]

    def untrained(self, seed: int) -> dict[str, float]:
        path = self.folder / "cells" / f"{seed}-untrained.json"
        if not path.exists():
            screens = Screens(self.folder, self.full(seed))
            found = {name: screens.accuracy(self.full(seed), "test", name) for name in (FULL, PRUNED)}
            path.write_text(json.dumps(found))
            print(seed, found, flush=True)
        return json.loads(path.read_text())  # type: ignore[no-any-return]


def measure(
    cells: Cells, seeds: list[int], num_tuned: int, ways: list[tuple[str, str]], lrs: tuple[float, ...]
) -> dict:
    """seed by seed, so that whatever is done when it is stopped is whole seeds; returns what `tables` takes.

    The first num_tuned seeds try all learning rates, the others only the one that these chose.
    """
    found: dict = {"untrained": {}, "ways": {way: {lr: {} for lr in lrs} for way in ways}}
    for number, seed in enumerate(seeds):
        found["untrained"][seed] = cells.untrained(seed)
        tried = dict.fromkeys(ways, lrs) if number < num_tuned else {way: [best_lr(found, way)] for way in ways}
        for way in ways:
            for lr in tried[way]:
                found["ways"][way][lr][seed] = cells.cell(seed, *way, lr)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=6, help="with 5 the least p that there can be is 0.06")
    parser.add_argument("--tuned", type=int, default=1, help="seeds that try all learning rates; the others the best")
    parser.add_argument("--folder", type=Path, default=Path("runs/kd_ways"))
    parser.add_argument("--full-records", type=int, default=2048, help="records of the full-token model")
    parser.add_argument("--full-steps", type=int, default=300, help="steps of 32 of the full-token model")
    parser.add_argument("--full-lr", type=float, default=2e-3)
    parser.add_argument("--steps", type=int, default=200, help="steps of 16 of recovery, for all ways alike")
    parser.add_argument("--records", type=int, default=1024, help="right, noisy and bare prompts; an eighth are narrow")
    parser.add_argument("--held-out", type=int, default=256, help="test records; three quarters as many to validate")
    parser.add_argument("--only", nargs="+", default=[], metavar="DATA", help="kinds of recovery data; all by default")
    parser.add_argument("--lrs", nargs="+", type=float, default=LRS, metavar="LR")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the record and the picture")
    parser.add_argument("--ways", nargs="+", default=[], metavar="WAY", help="all of the recovery data by default")
    args = parser.parse_args()
    if not is_rank():
        sys.exit(run_as_rank("benchmarks.kd_ways", sys.argv[1:]))
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    settings = {
        name: getattr(args, name) for name in ("full_records", "full_steps", "full_lr", "steps", "records", "held_out")
    }
    cells = Cells(args.folder, settings, join_ranks())
    if not (args.folder / "test.jsonl").exists():
        sizes = dict.fromkeys(("right", "noisy", "bare"), args.records) | {"narrow": args.records // 8}
        make_records(
            args.folder, {"full": args.full_records, **sizes, "val": args.held_out * 3 // 4, "test": args.held_out}
        )
    ways = [way for way in WAYS if (not args.only or way[0] in args.only) and (not args.ways or way[1] in args.ways)]
    found = measure(cells, list(range(args.seeds)), args.tuned, ways, tuple(args.lrs))
    text = tables(found)
    print(text)
    payload = {
        "settings": settings | {"seeds": args.seeds, "lrs": list(args.lrs)},
        "untrained": found["untrained"],
        "cells": {f"{data}: {way}": cells_of_way for (data, way), cells_of_way in found["ways"].items()},
    }
    write_record("kd_ways", payload, text, args.out)
    plot(found, args.out / "kd_ways.png")


if __name__ == "__main__":
    main()
