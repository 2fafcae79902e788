"""What a toy model learns from sessions: every screenshot whole, pred2d, and pred3d in both directions. Toy weights.

    python -m benchmarks.sessions_learn [--seeds 3] [--folder runs/sessions_learn]

Drawn sessions of four screenshots (benchmarks/parts/drawn_sessions.py), four tasks at once: where something is now,
where something is that never changed, what stood where it was closed, what the last action did. Each way is trained
from random weights with the labels, and, from the weights of the model that saw all tokens, with that model as its
teacher. All ways see the same records in the same order with the same learning rate, constant after its warm-up: Full
for so many steps; the others are asked after as many, and again after as many FLOPs (the teacher's are not counted: its
hidden states are made once). What is shown is accuracy on held-out sessions, read off teacher-forced answers of one
token a task. Samples, packs, model and losses are the framework's, the loop is this file's. A cell that is done is not
done again, so that it can be stopped. One thread.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from benchmarks.convergence import waves
from benchmarks.parts.drawn_sessions import CHANCE, TASKS, texts, write_sessions
from benchmarks.parts.record import RESULTS, markdown_table, write_record
from pixelprune.attention.segments import use_borders
from pixelprune.flops import CostModel
from pixelprune.pack import VisionGeometry, pack_samples
from pixelprune.records.prepare import PrepareSettings
from pixelprune.sample import Sample
from pixelprune.settings import PruneSettings, ResizeSettings
from training.composition.toy import build_toy_model
from training.loss.supervised import LossSettings, supervised_loss
from training.model.supervised import SupervisedModel

RESIZE = ResizeSettings(min_pixels=1024)
FULL = "Full"
WAYS = {
    FULL: PruneSettings("none"),
    "pred2d": PruneSettings("pred2d"),
    "backward": PruneSettings("pred3d", direction="backward"),
    "forward": PruneSettings("pred3d", direction="forward", keep_replaced=False),
    "keep_replaced": PruneSettings("pred3d", direction="forward"),
}
SCRATCH, TAUGHT = "from scratch", "taught by Full"


@dataclass(frozen=True)
class Settings:
    """Everything that a cell depends on besides the code."""

    num_sessions: int = 1000
    num_held_out: int = 200
    num_steps: int = 240
    num_taught_steps: int = 60
    samples_per_step: int = 32
    lr: float = 6e-3
    taught_lr: float = 2e-3
    warmup_steps: int = 20


class Bench:
    """Records, start weights and what was measured, in a folder."""

    def __init__(self, folder: Path, settings: Settings):
        self.folder, self.settings = folder, settings
        (folder / "cells").mkdir(parents=True, exist_ok=True)
        path = folder / "settings.json"
        if path.exists() and json.loads(path.read_text()) != asdict(settings):
            raise SystemExit(f"{folder} holds cells made with other settings: {path}; give another --folder")
        if not path.exists():
            write_sessions(folder, "train", range(settings.num_sessions))
            write_sessions(folder, "held_out", range(10**6, 10**6 + settings.num_held_out))
            self._write_start(folder / "start")
            path.write_text(json.dumps(asdict(settings)))
        config = AutoConfig.from_pretrained(folder / "start")
        self.geometry, self.cost = VisionGeometry.from_config(config), CostModel.from_config(config)
        self._samples: dict[tuple[str, str], list[Sample]] = {}

    def _write_start(self, folder: Path) -> None:
        build_toy_model(folder, texts())
        config = AutoConfig.from_pretrained(folder)
        config.text_config.update({"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2})
        config.text_config.update({"num_attention_heads": 3, "num_key_value_heads": 3, "initializer_range": 0.08})
        sizes = {"depth": 1, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "out_hidden_size": 96}
        config.vision_config.update({**sizes, "deepstack_visual_indexes": [0], "num_position_embeddings": 16 * 16})
        config.vision_config.update({"initializer_range": 0.08})
        config.save_pretrained(folder)

    def model(self, seed: int) -> SupervisedModel:
        """Random weights of that seed."""
        torch.manual_seed(seed)
        config = AutoConfig.from_pretrained(self.folder / "start")  # `use_borders` writes into a model's own
        stock = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
        with torch.no_grad():  # where things are is learned in minutes so, and not in hours: see benchmarks.convergence
            stock.model.visual.pos_embed.weight.copy_(3 * waves(16, 64))
        use_borders(stock)
        return SupervisedModel(stock, self.geometry, LossSettings()).train()

    def samples(self, split: str, way: str) -> list[Sample]:
        if (split, way) not in self._samples:
            preparer = PrepareSettings(str(self.folder / "start"), WAYS[way], RESIZE).build()
            rows = map(json.loads, (self.folder / f"{split}.jsonl").read_text().splitlines())
            self._samples[split, way] = [preparer.prepare(row, self.folder).sample for row in rows]
        return self._samples[split, way]

    def flops(self, way: str) -> float:
        """Of a training step's sample, on average."""
        samples = self.samples("train", way)
        kept = [[image.selection.num_kept for image in sample.images] for sample in samples]
        return statistics.mean(
            self.cost.sample_flops(
                kept_blocks=blocks,
                text_tokens=len(sample) - sum(blocks),
                supervised_tokens=sample.num_supervised,
                training=True,
            )
            for sample, blocks in zip(samples, kept, strict=True)
        )

    def steps(self, way: str, kind: str) -> tuple[int, int]:
        """After how many steps a cell is asked: as many as Full's, and as many FLOPs."""
        steps = self.settings.num_steps if kind == SCRATCH else self.settings.num_taught_steps
        return steps, round(steps * self.flops(FULL) / self.flops(way))

    def cell(self, seed: int, way: str, kind: str) -> dict[str, Any]:
        """Held-out accuracy of every task at equal steps and at equal FLOPs, measured or read."""
        path = self.folder / "cells" / f"{seed}-{way}-{'scratch' if kind == SCRATCH else 'taught'}.json"
        if not path.exists():
            begun, model, taught = time.process_time(), self.model(seed), None
            if kind == TAUGHT:
                model.load_state_dict(torch.load(self._weights(seed), weights_only=True))
                taught = self._hidden(model), self._head(model)
            equal_steps, equal_flops = self.steps(way, kind)
            found = self._train(model, way, seed, (equal_steps, equal_flops), taught)
            if way == FULL:
                torch.save(model.state_dict(), self._weights(seed))
            result = {
                "steps": [equal_steps, equal_flops],
                "at_steps": found[equal_steps],
                "at_flops": found[equal_flops],
            }
            path.write_text(json.dumps(result | {"cpu_s": time.process_time() - begun}))
            print(path.stem, path.read_text(), flush=True)
        return json.loads(path.read_text())  # type: ignore[no-any-return]

    def _weights(self, seed: int) -> Path:
        return self.folder / f"full-{seed}.pt"

    @torch.no_grad()
    def _hidden(self, model: SupervisedModel) -> torch.Tensor:
        """(records, supervised tokens, width): what the teacher's head is given, all blocks seen."""
        packs = _packs(self.samples("train", FULL), self.geometry)
        hidden = torch.cat([model.hidden_at_supervised(pack) for pack in packs])
        return hidden.unflatten(0, (self.settings.num_sessions, -1))

    def _head(self, model: SupervisedModel) -> torch.nn.Module:
        head = torch.nn.Linear(*reversed(model.model.lm_head.weight.shape), bias=False)
        head.weight.data.copy_(model.model.lm_head.weight.detach())
        return head.requires_grad_(False)

    def _train(
        self,
        model: SupervisedModel,
        way: str,
        seed: int,
        asked: Sequence[int],
        taught: tuple[torch.Tensor, torch.nn.Module] | None,
    ) -> dict[int, dict[str, float]]:
        settings, samples = self.settings, self.samples("train", way)
        lr = settings.taught_lr if taught else settings.lr
        loss = LossSettings(ce_weight=0, kd_weight=1) if taught else LossSettings()
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
        found: dict[int, dict[str, float]] = {}
        for step, numbers in enumerate(_orders(len(samples), settings.samples_per_step, max(asked), seed), start=1):
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1.0, step / settings.warmup_steps)
            pack = pack_samples([samples[number] for number in numbers], self.geometry)
            teacher = {}
            if taught:
                teacher = {"teacher_hidden": taught[0][numbers].flatten(0, 1), "teacher_head": taught[1]}
            hidden = model.hidden_at_supervised(pack)
            sums = supervised_loss(hidden, model.model.lm_head, pack.labels, loss, **teacher)  # type: ignore[arg-type]
            (sums.total / pack.num_supervised).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if step in asked:
                found[step] = self.accuracies(model, way)
        return found

    @torch.no_grad()
    def accuracies(self, model: SupervisedModel, way: str) -> dict[str, float]:
        """Task -> share of held-out sessions in which its word is the most probable one."""
        model.eval()
        right = []
        for pack in _packs(self.samples("held_out", way), self.geometry):
            top = model.model.lm_head(model.hidden_at_supervised(pack)).argmax(-1)
            right.append((top == pack.labels).unflatten(0, (pack.num_samples, -1))[:, : len(TASKS)])
        model.train()
        return dict(zip(TASKS, torch.cat(right).float().mean(0).tolist(), strict=True))


def _packs(samples: list[Sample], geometry: VisionGeometry, size: int = 50):
    return (pack_samples(samples[start : start + size], geometry) for start in range(0, len(samples), size))


def _orders(num_samples: int, size: int, num_steps: int, seed: int):
    """The records of every step: passes over all of them, in an order of the seed."""
    rng, waiting = np.random.default_rng(seed), list[int]()
    for _ in range(num_steps):
        while len(waiting) < size:
            waiting += rng.permutation(num_samples).tolist()
        yield waiting[:size]
        waiting = waiting[size:]


def measure(bench: Bench, seeds: Sequence[int]) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Kind -> way -> the seeds' cells. Seed by seed, so that what is done when it is stopped are whole seeds."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {SCRATCH: {}, TAUGHT: {}}
    for seed in seeds:
        for kind in found:
            for way in WAYS:
                if (kind, way) != (TAUGHT, FULL):
                    found[kind].setdefault(way, []).append(bench.cell(seed, way, kind))
    return found


def tables(found: dict[str, dict[str, list[dict[str, Any]]]], kept: dict[str, float], flops: dict[str, float]) -> str:
    """One for each kind: accuracy of every task, mean and standard deviation over seeds, in %."""
    parts = []
    for kind, ways in found.items():
        rows = []
        for way, cells in ways.items():
            for asked in ("at_steps", "at_flops")[: 1 if way == FULL else 2]:
                steps = cells[0]["steps"][0 if asked == "at_steps" else 1]
                row: dict[str, Any] = {"way": way, "kept": f"{kept[way]:.0%}", "FLOPs of a step": f"{flops[way]:.2f}"}
                row |= {"at equal": "steps" if asked == "at_steps" else "FLOPs", "steps": steps}
                for task in TASKS:
                    row[task] = _mean([cell[asked][task] for cell in cells])
                row["all"] = _mean([statistics.mean(cell[asked].values()) for cell in cells])
                rows.append(row)
        parts.append(f"{kind[0].upper()}{kind[1:]}:\n\n{markdown_table(rows)}")
    return "\n\n".join(parts)


def _mean(values: list[float]) -> str:
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{spread}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = Settings()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("runs/sessions_learn"))
    parser.add_argument("--sessions", type=int, default=defaults.num_sessions)
    parser.add_argument("--held-out", type=int, default=defaults.num_held_out)
    parser.add_argument("--steps", type=int, default=defaults.num_steps, help="of Full from scratch")
    parser.add_argument("--taught-steps", type=int, default=defaults.num_taught_steps)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the record")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    settings = Settings(options.sessions, options.held_out, options.steps, options.taught_steps)
    bench = Bench(options.folder, settings)
    found = measure(bench, range(options.seeds))
    blocks = {way: sum(sample.num_patches for sample in bench.samples("train", way)) for way in WAYS}
    kept = {way: number / blocks[FULL] for way, number in blocks.items()}
    flops = {way: bench.flops(way) / bench.flops(FULL) for way in WAYS}
    chance = ", ".join(f"{task} {share:.0%}" for task, share in CHANCE.items())
    about = "; ".join(f"{task}: {what}" for task, what in TASKS.items())
    text = (
        f"{settings.num_sessions} drawn sessions of four screenshots, {settings.num_held_out} others held out, "
        f"{options.seeds} seeds (weights and order). Accuracy in %, by chance {chance}. {about[0].upper()}{about[1:]}. "
        f"Load average at the end: {os.getloadavg()[0]:.1f}.\n\n{tables(found, kept, flops)}"
    )
    print(text)
    payload = {"settings": asdict(settings), "seeds": options.seeds, "kept": kept, "flops": flops, "cells": found}
    write_record("sessions_learn", payload, text, options.out)


if __name__ == "__main__":
    main()
