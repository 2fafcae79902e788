"""A toy model learns to click from scratch, Full and PixelPrune side by side on the same samples per step.

python -m benchmarks.convergence

What the paper's section 4.4 does with Qwen3-VL on screenshots, made small enough for a CPU: drawn screens (see
benchmarks/parts/screens.py, far simpler than screenshots) and a model of under a million parameters. Both start
from the same weights and see the same records in the same order. Every k steps held-out screens are answered in the
three modes Full -> Full, PixelPrune -> PixelPrune and PixelPrune -> Full; in the end also training screens and blank
images.

Each mode trains in a process of its own with one thread, both at the same time, on a loop of this file's around the
framework's samples, packs, loss, schedule and generation (not on the DeepSpeed engine). Step times are medians over the
time in which both ran. The whole takes 25 minutes on two cores that are shared with other work.

Exit code 1 when a run of the full length misses a check (the column "reaches"); shorter runs only report.
"""

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from transformers import AutoConfig, AutoModelForImageTextToText

from benchmarks.parts.record import RESULTS, markdown_table, write_record
from benchmarks.parts.screens import write_screens
from pixelprune.flops import CostModel
from pixelprune.pack import VisionGeometry, pack_samples
from pixelprune.prompter import Prompter
from pixelprune.records.prepare import PrepareSettings
from pixelprune.sample import Sample
from pixelprune.settings import PruneSettings, ResizeSettings
from training.composition.toy import build_toy_model, texts_of_records
from training.config.settings import ScheduleSettings
from training.data.settings import SourceSettings
from training.evaluation.answering import AnswerSettings, predict, read_tasks
from training.evaluation.scoring import summarise
from training.loss.supervised import LossSettings
from training.model.parameters import lr_factor
from training.model.supervised import SupervisedModel

RESIZE = ResizeSettings(min_pixels=1024)
PRUNES = {"Full": PruneSettings("none"), "PixelPrune": PruneSettings()}
EVALUATED = {"Full": ("Full",), "PixelPrune": ("PixelPrune", "Full")}
MODES = tuple(f"{trained} -> {evaluated}" for trained, modes in EVALUATED.items() for evaluated in modes)
GRID = 10
"""Cells per side of the grid of constant answers."""


@dataclass(frozen=True)
class Settings:
    """Everything that the result depends on besides the code."""

    num_pages: int = 800
    num_held_out_pages: int = 100
    num_controls: int = 2
    side: int = 128
    num_steps: int = 3600
    every: int = 300
    samples_per_step: int = 32
    samples_per_pack: int = 8
    lr: float = 3e-3
    warmup_steps: int = 50
    seed: int = 0


def main(argv: list[str] | None = None) -> int:
    """The whole demonstration; 1 when a run of the full length misses what it is to show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = Settings()
    parser.add_argument("--steps", type=int, default=defaults.num_steps)
    parser.add_argument("--every", type=int, default=defaults.every, help="steps between two evaluations")
    parser.add_argument("--pages", type=int, default=defaults.num_pages, help="training screens")
    parser.add_argument("--held-out-pages", type=int, default=defaults.num_held_out_pages, help="screens answered")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the record and the plot")
    options = parser.parse_args(argv)
    settings = Settings(
        num_pages=options.pages,
        num_held_out_pages=options.held_out_pages,
        num_steps=options.steps,
        every=options.every,
        seed=options.seed,
    )
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data_and_start(folder, settings)
        context = multiprocessing.get_context("spawn")
        processes = [context.Process(target=train, args=(folder, trained, settings)) for trained in PRUNES]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise SystemExit("a training process failed; its own message says why")
        runs = {trained: json.loads((folder / f"{trained}.json").read_text()) for trained in PRUNES}
        constant = best_constant(folder / "held_out.jsonl")
    checks = report(runs, constant, settings, time.monotonic() - started, options.out)
    return exit_code(checks, settings)


def exit_code(checks: dict[str, dict[str, bool]], settings: Settings) -> int:
    """1 when a check is missed, unless the run was shorter than it takes: said on the error stream."""
    missed = [f"{mode}: {name}" for mode, entries in checks.items() for name, holds in entries.items() if not holds]
    if not missed or settings.num_steps < Settings.num_steps:
        return 0
    Console(stderr=True).print(f"missed: {'; '.join(missed)}", style="red", markup=False, soft_wrap=True)
    return 1


def write_data_and_start(folder: Path, settings: Settings) -> None:
    """Screens and the initial model. Blank records are the held-out ones with an empty page for an image."""
    shape = {"side": settings.side, "num_controls": settings.num_controls}
    first = settings.seed * 10_000_000
    train_path = write_screens(folder, "train", range(first, first + settings.num_pages), **shape)
    held_out = range(first + 5_000_000, first + 5_000_000 + settings.num_held_out_pages)
    held_out_path = write_screens(folder, "held_out", held_out, **shape)
    validation = range(first + 7_000_000, first + 7_000_000 + settings.num_held_out_pages)
    write_screens(folder, "validation", validation, **shape)
    Image.new("RGB", (settings.side, settings.side), (250, 250, 250)).save(folder / "images" / "blank.png")
    records = [json.loads(line) for line in held_out_path.read_text().splitlines()]
    for record in records:
        record["messages"][0]["content"][0]["image"] = "images/blank.png"
    (folder / "blank.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    sample = train_path.read_text().splitlines()[: len(records)]
    (folder / "train_sample.jsonl").write_text("\n".join(sample) + "\n")
    write_start(folder / "start", texts_of_records(train_path), settings)


def write_start(folder: Path, texts: list[str], settings: Settings) -> None:
    """A Qwen3-VL of two and two layers with random weights."""
    build_toy_model(folder, texts)
    config = AutoConfig.from_pretrained(folder)
    text, vision = config.text_config, config.vision_config
    text.update({"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2, "initializer_range": 0.08})
    text.update({"num_attention_heads": 3, "num_key_value_heads": 1})
    vision.update({"hidden_size": 64, "intermediate_size": 128, "depth": 2, "num_heads": 2, "out_hidden_size": 96})
    vision.update({"deepstack_visual_indexes": [0], "initializer_range": 0.08, "num_position_embeddings": 16 * 16})
    torch.manual_seed(settings.seed)
    model = AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        # Where things are must not be drowned by what they look like: random tables this small took far longer.
        model.model.visual.pos_embed.weight.copy_(3 * waves(16, 64))
    model.save_pretrained(folder)


def waves(side: int, width: int) -> torch.Tensor:
    """Rows of sines and cosines for a grid, (side * side, width): half the columns for the row, half for the column."""
    frequencies = 0.6 / 30 ** (torch.arange(width // 4) / (width // 4))
    angles = torch.arange(side)[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], dim=1)
    return torch.cat([line[:, None].expand(side, side, -1), line[None].expand(side, side, -1)], dim=-1).flatten(0, 1)


def train(folder: Path, trained: str, settings: Settings) -> None:
    """One mode, start to end, in this process; writes folder/MODE.json."""
    torch.set_num_threads(1)

    def wait_for_others() -> None:  # so that both train at the same time
        (folder / f"{trained}.ready").touch()
        while not all((folder / f"{mode}.ready").exists() for mode in PRUNES):
            time.sleep(0.05)

    (folder / f"{trained}.json").write_text(json.dumps(fit(folder, trained, settings, wait_for_others)))


def fit(folder: Path, trained: str, settings: Settings, before: Callable[[], None] = lambda: None) -> dict:
    """Train one mode and answer with it; before: called when all is loaded. Returns what `report` takes of it."""
    samples = load_samples(folder, trained)
    config = AutoConfig.from_pretrained(folder / "start")
    stock = AutoModelForImageTextToText.from_pretrained(folder / "start", dtype=torch.float32)
    geometry = VisionGeometry.from_config(config)
    model = SupervisedModel(stock, geometry, LossSettings()).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = ScheduleSettings(warmup_steps=settings.warmup_steps)
    before()
    console = Console(highlight=False)
    steps, evaluations = [], [{"step": 0} | accuracies(folder, stock, trained, "held_out")]
    for step, ids in enumerate(orders(len(samples), settings)):
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * lr_factor(step, settings.num_steps, schedule)
        begun = time.time()
        loss = train_step(model, optimizer, [samples[i] for i in ids], geometry, settings)
        steps.append({"loss": loss, "begun": begun, "seconds": time.time() - begun})
        if (step + 1) % settings.every == 0 or step + 1 == settings.num_steps:
            evaluations.append({"step": step + 1} | accuracies(folder, stock, trained, "held_out"))
            shown = ", ".join(f"{mode} {evaluations[-1][mode]:.1%}" for mode in MODES if mode in evaluations[-1])
            console.print(f"step {step + 1}: loss {loss:.3f}, held-out {shown}")
    cost = CostModel.from_config(config)
    return {
        "steps": steps,
        "evaluations": evaluations,
        "train_accuracy": accuracies(folder, stock, trained, "train_sample"),
        "blank_accuracy": accuracies(folder, stock, trained, "blank"),
        "validation_accuracy": accuracies(folder, stock, trained, "validation"),
        "flops_per_sample": sum(sample_cost(cost, sample) for sample in samples) / len(samples),
        "kept_blocks": sum(sample.images[0].selection.num_kept for sample in samples),
        "full_blocks": sum(sample.images[0].num_full_blocks for sample in samples),
        "num_parameters": sum(parameter.numel() for parameter in stock.parameters()),
    }


def load_samples(folder: Path, trained: str) -> list[Sample]:
    preparer = PrepareSettings(str(folder / "start"), PRUNES[trained], RESIZE).build()
    lines = (folder / "train.jsonl").read_text().splitlines()
    return [preparer.prepare(json.loads(line), folder).sample for line in lines]


def orders(num_samples: int, settings: Settings):
    """The records of every step: passes over all of them in seeded order, the same for both modes."""
    generator = np.random.default_rng(settings.seed)
    waiting: list[int] = []
    for _ in range(settings.num_steps):
        while len(waiting) < settings.samples_per_step:
            waiting += generator.permutation(num_samples).tolist()
        yield waiting[: settings.samples_per_step]
        waiting = waiting[settings.samples_per_step :]


def train_step(
    model: SupervisedModel,
    optimizer: torch.optim.Optimizer,
    samples: list[Sample],
    geometry: VisionGeometry,
    settings: Settings,
) -> float:
    """Packs of a step, loss sums over its supervised tokens; returns the mean loss per supervised token."""
    num_supervised = sum(sample.num_supervised for sample in samples)
    total = 0.0
    for start in range(0, len(samples), settings.samples_per_pack):
        sums = model(pack_samples(samples[start : start + settings.samples_per_pack], geometry))
        (sums.total / num_supervised).backward()
        total += sums.total.item() / num_supervised
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return total


def accuracies(folder: Path, model, trained: str, name: str) -> dict[str, float]:
    """Click accuracy on a file of records, in every mode that this model is evaluated in."""
    tasks, _ = read_tasks([SourceSettings(str(folder / f"{name}.jsonl"))])
    found = {}
    model.eval()
    for evaluated in EVALUATED[trained]:
        prompter = Prompter.load(folder / "start", prune=PRUNES[evaluated], resize=RESIZE)
        batches = predict(model, prompter, tasks, AnswerSettings(max_new_tokens=14, batch_size=50))
        score = summarise(prediction for batch in batches for prediction in batch)["overall"]["all"]
        if score["num_failed"]:
            raise RuntimeError(f"{score['num_failed']} generations failed on {name}")
        found[f"{trained} -> {evaluated}"] = score["accuracy"]
    model.train()
    return found


def sample_cost(cost: CostModel, sample: Sample) -> float:
    kept = [image.selection.num_kept for image in sample.images]
    return cost.sample_flops(
        kept_blocks=kept,
        text_tokens=len(sample) - sum(kept),
        supervised_tokens=sample.num_supervised,
        training=True,
    )


def best_constant(path: Path) -> float:
    """Accuracy of the best constant answer: of a 10x10 grid, the cell whose centre lies in the most boxes."""
    metadata = [json.loads(line)["metadata"] for line in path.read_text().splitlines()]
    hits = np.zeros((GRID, GRID), dtype=int)
    for row in range(GRID):
        for col in range(GRID):
            for record in metadata:
                (x1, y1, x2, y2), (width, height) = record["bbox"], record["image_size"]
                x, y = (col + 0.5) * width / GRID, (row + 0.5) * height / GRID
                hits[row, col] += x1 <= x <= x2 and y1 <= y <= y2
    return float(hits.max()) / len(metadata)


def report(
    runs: dict[str, dict], constant: float, settings: Settings, seconds: float, out: Path
) -> dict[str, dict[str, bool]]:
    """Table, plot and record; returns mode -> check -> whether it holds."""
    rows: dict[int, dict] = {}
    for run in runs.values():
        for evaluation in run["evaluations"]:
            rows.setdefault(evaluation["step"], {}).update(evaluation)
    table = [{"step": step, **{mode: f"{row[mode]:.1%}" for mode in MODES}} for step, row in sorted(rows.items())]
    both_until = min(run["steps"][-1]["begun"] for run in runs.values())
    median = {
        name: float(np.median([step["seconds"] for step in run["steps"] if step["begun"] <= both_until]))
        for name, run in runs.items()
    }
    full, pruned = runs["Full"], runs["PixelPrune"]
    wall_ratio = median["Full"] / median["PixelPrune"]
    flops_ratio = full["flops_per_sample"] / pruned["flops_per_sample"]
    last = rows[settings.num_steps]
    train_accuracy = full["train_accuracy"] | pruned["train_accuracy"]
    blank_accuracy = full["blank_accuracy"] | pruned["blank_accuracy"]
    checks = {
        mode: {
            "train >= 90 %": train_accuracy[mode] >= 0.9,
            "held-out >= 3x best constant": last[mode] >= 3 * constant,
            "held-out >= 3x blank images": last[mode] > 0 and last[mode] >= 3 * blank_accuracy[mode],
        }
        for mode in MODES
    }
    final = [
        {
            "mode": mode,
            "held-out": f"{last[mode]:.1%}",
            "training screens": f"{train_accuracy[mode]:.1%}",
            "blank images": f"{blank_accuracy[mode]:.1%}",
            "reaches": ", ".join(name for name, holds in checks[mode].items() if holds) or "none",
        }
        for mode in MODES
    ]
    retain = pruned["kept_blocks"] / pruned["full_blocks"]
    summary = (
        f"{settings.num_pages} drawn screens of {settings.side}x{settings.side} pixels with 1 to "
        f"{settings.num_controls} controls each (synthetic, see benchmarks/parts/screens.py), "
        f"{settings.num_steps} steps of {settings.samples_per_step} records, "
        f"{full['num_parameters']:,} parameters, retain ratio {retain:.1%}. Best "
        f"constant answer: {constant:.1%}. Step time Full / PixelPrune: {wall_ratio:.2f} (medians {median['Full']:.3f} "
        f"and {median['PixelPrune']:.3f} s, both training at once, one thread each); FLOPs ratio by the cost model: "
        f"{flops_ratio:.2f}. Whole run: {seconds / 60:.1f} min."
    )
    text = f"{summary}\n\n{markdown_table(table)}\n\n{markdown_table(final)}"
    out.mkdir(parents=True, exist_ok=True)
    plot(runs, constant, out / "convergence.png")
    payload = {
        "command": "python -m benchmarks.convergence",
        "settings": asdict(settings),
        "evaluations": [rows[step] for step in sorted(rows)],
        "train_accuracy": train_accuracy,
        "blank_accuracy": blank_accuracy,
        "best_constant": constant,
        "checks": checks,
        "step_seconds": median,
        "wall_ratio": wall_ratio,
        "flops_ratio": flops_ratio,
        "retain_ratio": retain,
        "minutes": seconds / 60,
        "loss": {name: [round(step["loss"], 4) for step in run["steps"][::10]] for name, run in runs.items()},
    }
    path = write_record("convergence", payload, text, out)
    console = Console()
    console.print(text, markup=False, soft_wrap=True)
    console.print(f"wrote {path}", soft_wrap=True)
    return checks


def plot(runs: dict[str, dict], constant: float, path: Path) -> None:
    """Training loss and held-out click accuracy over steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), dpi=130)
    for number, (name, run) in enumerate(runs.items()):
        losses = np.array([step["loss"] for step in run["steps"]])
        window = max(1, len(losses) // 60)
        smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
        left.plot(np.arange(len(smooth)) + window, smooth, color=f"C{number}", label=name)
    left.set(xlabel="optimizer step", ylabel="training loss per supervised token (nats)", ylim=(0, 0.6))
    for number, mode in enumerate(MODES):
        evaluations = runs[mode.split(" -> ")[0]]["evaluations"]
        steps = [evaluation["step"] for evaluation in evaluations]
        accuracy = [100 * evaluation[mode] for evaluation in evaluations]
        right.plot(steps, accuracy, "o-", markersize=4, color=f"C{number}", label=mode)
    right.axhline(100 * constant, color="grey", linestyle="--", linewidth=1, label="best constant answer")
    right.set(xlabel="optimizer step", ylabel="held-out click accuracy (%)", ylim=(0, 100))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
