"""What an order over screenshots does to training: the same records under data.share_prefix=off, step and group.

    python -m benchmarks.share_convergence [--steps 400] [--pages 400]

A toy model learns to click on drawn screens (benchmarks/parts/screens.py) with several questions about each, in
PixelPrune mode, with the framework's index, plan, loader, packs and loss, and the optimizer and initial weights of
`benchmarks.convergence`. The fourth way keeps the number of screenshots in a step, as docs/sharing.md advises: under
group with four times the samples in a step, and a quarter of the steps. All ways see as many records; the curves are
drawn over them. They run one after the other in this process on one thread. Held-out loss is the cross-entropy per
token of screens that nobody trains on.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from benchmarks.convergence import PRUNES, RESIZE, write_start
from benchmarks.convergence import Settings as ModelSettings
from benchmarks.parts.record import RESULTS, markdown_table, write_record
from benchmarks.parts.screens import write_screens
from pixelprune.attention.segments import use_borders
from pixelprune.flops import CostModel
from pixelprune.pack import VisionGeometry
from pixelprune.records.prepare import PrepareSettings
from training.composition.toy import texts_of_records
from training.config.settings import ScheduleSettings
from training.data.index import Index
from training.data.index_builder import build_index
from training.data.loader import LoaderSettings, MicroBatch, PackLoader
from training.data.plan import PlanSettings
from training.data.settings import SourceSettings
from training.loss.supervised import LossSettings
from training.model.parameters import lr_factor
from training.model.supervised import SupervisedModel

MAX_SHARED = 16
TIMES = 4
"""Samples per step of the last way, of those of the others."""
WAYS = {"off": ("off", 1), "step": ("step", 1), "group": ("group", 1), f"group, {TIMES}x samples": ("group", TIMES)}


@dataclass(frozen=True)
class Settings:
    """Everything that the result depends on besides the code."""

    num_pages: int = 400
    num_held_out_pages: int = 40
    num_controls: int = 8
    side: int = 160
    num_steps: int = 400
    samples_per_step: int = 32
    num_evaluations: int = 8
    lr: float = 3e-3
    warmup_steps: int = 20
    seed: int = 0


class Bench:
    """The records, their indexes and the initial weights, in a folder."""

    def __init__(self, folder: Path, settings: Settings):
        self.folder, self.settings = folder, settings
        shape = {"side": settings.side, "num_controls": settings.num_controls}
        paths = {
            "train": write_screens(folder, "train", range(settings.num_pages), **shape),
            "held_out": write_screens(folder, "held_out", range(10**6, 10**6 + settings.num_held_out_pages), **shape),
        }
        self.start = folder / "start"
        write_start(self.start, texts_of_records(paths["train"]), ModelSettings(side=settings.side, seed=settings.seed))
        self.prepare = PrepareSettings(str(self.start), PRUNES["PixelPrune"], RESIZE)
        config = AutoConfig.from_pretrained(self.start)
        self.geometry, self.cost = VisionGeometry.from_config(config), CostModel.from_config(config)
        self.index = {
            name: build_index([SourceSettings(str(path))], self.prepare, num_workers=0, show_progress=False)
            for name, path in paths.items()
        }

    def loader(self, share: str, samples_per_step: int, num_steps: int) -> PackLoader:
        return self._loader(self.index["train"], share, num_steps=num_steps, samples_per_step=samples_per_step)

    def _loader(self, index: Index, share: str, *, num_steps: int | None, **plan: Any) -> PackLoader:
        given = {"pack_tokens": 2048, "pack_patches": 8192, "seed": self.settings.seed}
        settings = PlanSettings(**(given | plan), max_shared=MAX_SHARED if share == "group" else 0)
        return PackLoader(
            index,
            index.plan_input(self.cost),
            settings,
            self.prepare,
            self.geometry,
            LoaderSettings(share_prefix=share != "off"),
            num_steps=num_steps,
        )

    @torch.no_grad()
    def held_out_loss(self, model: SupervisedModel) -> float:
        """Cross-entropy per supervised token, every sample computed for itself."""
        model.eval()
        index = self.index["held_out"]
        batches = list(self._loader(index, "off", num_steps=None, samples_per_step=len(index), shuffle=False))
        total = sum(float(model(batch.pack).ce) for batch in batches)
        model.train()
        return total / int(index.num_supervised.sum())

    def model(self) -> SupervisedModel:
        stock = AutoModelForImageTextToText.from_pretrained(self.start, dtype=torch.float32)
        use_borders(stock)
        return SupervisedModel(stock, self.geometry, LossSettings()).train()


def train(bench: Bench, share: str, times: int) -> dict[str, Any]:
    """One way from the initial weights to the end: losses of all steps, held-out losses, what was computed."""
    settings, model = bench.settings, bench.model()
    num_steps, size = settings.num_steps // times, settings.samples_per_step * times
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = ScheduleSettings(warmup_steps=settings.warmup_steps // times)
    every = max(1, num_steps // settings.num_evaluations)
    losses, held_out, tokens, screens, seconds = [], [(0, bench.held_out_loss(model))], 0, list[int](), 0.0
    for step, batches in enumerate(_steps(bench.loader(share, size, num_steps))):
        begun, total = time.process_time(), 0.0
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * lr_factor(step, num_steps, schedule)
        for batch in batches:
            sums = model(batch.pack)
            (sums.total / batch.num_supervised).backward()
            total += float(sums.total.detach()) / batch.num_supervised
            tokens += batch.pack.num_tokens
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
        rows = [int(record.split(":")[-1]) for batch in batches for record in batch.record_ids]
        screens.append(len(set(bench.index["train"].picture_hash[rows].tolist())))
        seconds += time.process_time() - begun
        if (step + 1) % every == 0 or step + 1 == num_steps:
            held_out.append(((step + 1) * size, bench.held_out_loss(model)))
            print(f"{share} x{times}, step {step + 1}: loss {total:.3f}, held out {held_out[-1][1]:.3f}", flush=True)
    counts = {"tokens": tokens, "cpu_s": seconds, "screens_per_step": float(np.mean(screens))}
    return {"losses": losses, "samples_per_step": size, "held_out": held_out, **counts}


def _steps(loader: PackLoader) -> Iterator[list[MicroBatch]]:
    return (list(batches) for _, batches in loader.steps())


def roughness(run: dict[str, Any]) -> float:
    """Standard deviation of the last half's losses around their line: the noise of a step, in nats."""
    losses = np.array(run["losses"][len(run["losses"]) // 2 :])
    steps = np.arange(len(losses))
    return float(np.std(losses - np.polyval(np.polyfit(steps, losses, 1), steps))) if len(losses) > 2 else 0.0


def table_of(runs: dict[str, dict[str, Any]]) -> str:
    off = runs["off"]
    return markdown_table(
        [
            {
                "data.share_prefix": name,
                "screenshots in a step": f"{run['screens_per_step']:.1f}",
                "steps": len(run["losses"]),
                "last held-out loss": f"{run['held_out'][-1][1]:.3f}",
                "lowest held-out loss": f"{min(loss for _, loss in run['held_out']):.3f}",
                "noise of a step's loss": f"{roughness(run):.3f}",
                "tokens computed": f"{run['tokens'] / off['tokens']:.0%}",
                "CPU time": f"{run['cpu_s'] / off['cpu_s']:.0%}",
            }
            for name, run in runs.items()
        ]
    )


def plot(runs: dict[str, dict[str, Any]], path: Path) -> None:
    """Training loss and held-out loss over records seen."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), dpi=130)
    for number, (name, run) in enumerate(runs.items()):
        style = {"color": f"C{number}", "label": name, "linestyle": "--" if name == "step" else "-"}
        seen = run["samples_per_step"] * (1 + np.arange(len(run["losses"])))
        left.plot(seen, run["losses"], linewidth=1.2, **style)
        records, losses = zip(*run["held_out"], strict=True)
        right.plot(records, losses, marker="o", markersize=4, **style)
    left.set(xlabel="records seen", ylabel="training loss per supervised token (nats)")
    right.set(xlabel="records seen", ylabel="held-out loss per supervised token (nats)")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.set_ylim(bottom=0)
    left.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = Settings()
    parser.add_argument("--steps", type=int, default=defaults.num_steps)
    parser.add_argument("--pages", type=int, default=defaults.num_pages, help="training screens")
    parser.add_argument("--held-out-pages", type=int, default=defaults.num_held_out_pages)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the record and the picture")
    options = parser.parse_args(argv)
    settings = Settings(
        num_pages=options.pages,
        num_held_out_pages=options.held_out_pages,
        num_steps=options.steps,
        seed=options.seed,
    )
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(Path(name), settings)
        runs = {way: train(bench, *how) for way, how in WAYS.items()}
        num_records = len(bench.index["train"])
    apart = max(abs(a - b) for a, b in zip(runs["off"]["losses"], runs["step"]["losses"], strict=True))
    sentence = (
        f"{settings.num_pages} drawn screens of {settings.side}x{settings.side} pixels, {num_records} questions about "
        f"them (synthetic, see benchmarks/parts/screens.py), {settings.num_steps * settings.samples_per_step:,} "
        f"records seen by every way, {settings.samples_per_step} or {settings.samples_per_step * TIMES} in a step; one "
        f"seed. Largest difference of a step's loss between off and step: {apart:.1e}. Noise: standard deviation of a "
        f"step's loss around a line through the last half. Load average at the end: {os.getloadavg()[0]:.1f}; read the "
        "CPU time."
    )
    table = table_of(runs)
    print(sentence + "\n\n" + table)
    options.out.mkdir(parents=True, exist_ok=True)
    plot(runs, options.out / "share_convergence.png")
    payload = {"settings": asdict(settings), "off_to_step": apart, "runs": runs}
    write_record("share_convergence", payload, sentence + "\n\n" + table, options.out)


if __name__ == "__main__":
    main()
