"""Does the full-token model teach its pruned self? A demonstration with toy weights on crops of the sample screens.

    python -m benchmarks.kd_recovery [--seeds 3] [--folder runs/kd_recovery]

A toy Qwen3-VL is trained on all tokens (the "pre-trained" model). It is then evaluated on held-out screens, on all
tokens and pruned without training, and trained on for a few steps on pruned inputs, once with cross-entropy and once
with the full-token model as its teacher; everything through the framework's own trainer. What a model of this size
learns of the samples' real records ("Click on ...") does not depend on the image, so the content is simpler: crops of
192 x 192 pixels (6 x 6 blocks) with a flat panel over their left side, and the question how many blocks wide it is.
The full-token model can go by how many of its tokens are panel; pruning leaves one of these, so that the answer has to
be read from where the rest of the screen begins. Training crops and held-out crops come from different pages. One
thread, one rank.
"""

import argparse
import dataclasses
import json
import logging
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.parts.one_rank import is_rank, run_as_rank
from benchmarks.parts.record import markdown_table, write_record
from benchmarks.parts.small_model import make_small_model
from pixelprune.settings import BLOCK
from training.config.recipe import load_recipe
from training.config.settings import Config
from training.distributed.ranks import Ranks, join_ranks
from training.loop.context import RunContext
from training.loop.feed import build_feed, validation_loader
from training.loop.run import run
from training.loss.supervised import LossSettings
from training.model.loading import load_model, load_model_files
from training.model.supervised import SupervisedModel

SAMPLES = Path("data_tools/samples")
SIDE = 192
PANEL = (30, 60, 200)
QUESTION = "How wide?"
NUM_CROPS = {"train": 2048, "eval": 256}
FULL, PRUNED = "none", "pred2d"
COMMON = [
    "data.samples_per_step=32", "data.pack_tokens=1024", "data.pack_patches=4096", "data.index_workers=1",
    "resize.min_pixels=1024", "resize.max_pixels=65536", "distributed.threads_per_rank=1", "model.recompute_vit=0",
    "model.recompute_llm=0", "tracking.log_every=10",
]  # fmt: skip
ROWS = ("Full", "PixelPrune, training-free", "PixelPrune + CE", "PixelPrune + KD")


def make_screens(folder: Path) -> None:
    """Seeded crops of the sample screenshots under a panel of 1 to 5 blocks, with its width as the answer."""
    for split, num in NUM_CROPS.items():
        (folder / split).mkdir(parents=True, exist_ok=True)
        lines = []
        for number, crop in enumerate(_crops(split, num)):
            width = 1 + number % (SIDE // BLOCK - 1)
            crop = crop.copy()
            crop[:, : BLOCK * width] = PANEL
            name = f"{split}/{number}.png"
            Image.fromarray(crop).save(folder / name)
            content = [{"type": "image", "image": name}, {"type": "text", "text": QUESTION}]
            messages = [{"role": "user", "content": content}, {"role": "assistant", "content": str(width)}]
            lines.append(json.dumps({"messages": messages}))
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")


def _crops(split: str, num: int) -> list[np.ndarray]:
    """Crops of the screenshots that the split's records show: pages of training and evaluation are other ones."""
    records = [json.loads(line) for line in (SAMPLES / f"{split}.jsonl").read_text().splitlines()]
    names = sorted({part["image"] for r in records for part in r["messages"][0]["content"] if part["type"] == "image"})
    pictures = [np.asarray(Image.open(SAMPLES / name).convert("RGB")) for name in names]
    rng = np.random.default_rng(len(split))
    crops = []
    for number in range(num):
        picture = pictures[number % len(pictures)]
        top, left = (rng.integers(0, size - SIDE + 1) for size in picture.shape[:2])
        crops.append(picture[top : top + SIDE, left : left + SIDE])
    return crops


def make_model(folder: Path, seed: int) -> Path:
    """Random weights of that seed, in a folder."""
    return make_small_model(folder, [QUESTION, "1 2 3 4 5"], seed)


def recipe(folder: Path, model: Path, name: str, *overrides: str) -> Config:
    """The debug twin of configs/kd_recovery.yaml on the crops."""
    paths = [f"model.path={model}", f"run.folder={folder}", f"run.name={name}", f"data.index_dir={folder}/index",
             f"data.sources.0.path={folder}/train.jsonl", f"data.eval_sources.0.path={folder}/eval.jsonl"]  # fmt: skip
    return load_recipe("configs/kd_recovery_debug.yaml", [*paths, *COMMON, *overrides])


def train(config: Config) -> tuple[Path, float]:
    """Train from the beginning; the exported model and the seconds it took."""
    folder = Path(config.run.folder) / config.run.name
    shutil.rmtree(folder, ignore_errors=True)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, eval_sources=[]))
    started = time.perf_counter()
    run(config)
    return folder / "export", time.perf_counter() - started


@torch.no_grad()
def evaluate(config: Config, ranks: Ranks) -> tuple[float, list[tuple[int, ...]], float, float]:
    """Held-out loss per supervised token, the most probable answer to every record, accuracy, retain ratio."""
    files = load_model_files(config.model)
    model = load_model(config.model, attention="sdpa", device=ranks.device).eval()
    module = SupervisedModel(model, files.geometry, LossSettings()).eval()
    context = RunContext(config, ranks, Path(config.run.folder), files)
    feed = build_feed(context, config.data.eval_sources, shuffle=False)
    loss, answers, num_right = 0.0, {}, 0
    for batch in validation_loader(context, feed):
        pack = batch.pack
        loss += float(module(pack).ce)
        top1 = model.lm_head(module.hidden_at_supervised(pack)).argmax(-1)
        sizes = list(pack.num_supervised_per_sample)
        for record, answer, label in zip(pack.record_ids, top1.split(sizes), pack.labels.split(sizes), strict=True):
            # Teacher-forced, but for a one-token answer that is the greedy one.
            answers[record] = int(answer[0])
            num_right += int(answer[0] == label[0])
    ordered = [answers[record] for record in sorted(answers)]
    return loss / int(feed.index.num_supervised.sum()), ordered, num_right / len(ordered), feed.index.retain_ratio


def one_seed(folder: Path, seed: int, ranks: Ranks, settings: argparse.Namespace) -> dict[str, dict[str, float]]:
    """The four rows of one seed: start weights and data order are its own."""
    start = make_model(folder / f"start-{seed}", seed)
    steps = [f"schedule.max_steps={settings.steps}", "schedule.warmup_steps=10", f"optim.lr={settings.lr}"]
    long = [f"schedule.max_steps={settings.full_steps}", "schedule.warmup_steps=20", f"optim.lr={settings.full_lr}"]
    seeded = f"run.seed={seed}"
    full, full_s = train(
        recipe(folder, start, f"full-{seed}", *long, seeded, "loss.kd_weight=0", f"prune.strategy={FULL}")
    )
    ce, ce_s = train(recipe(folder, full, f"ce-{seed}", *steps, seeded, "loss.kd_weight=0"))
    kd, kd_s = train(recipe(folder, full, f"kd-{seed}", *steps, seeded, "loss.ce_weight=0", "loss.kd_weight=1"))
    rows: dict[str, dict[str, float]] = {}
    answers: list[Any] = []
    for name, model, strategy, seconds in zip(
        ROWS, (full, full, ce, kd), (FULL, PRUNED, PRUNED, PRUNED), (full_s, 0.0, ce_s, kd_s), strict=True
    ):
        config = recipe(folder, model, f"eval-{seed}", f"prune.strategy={strategy}")
        loss, mine, accuracy, retain = evaluate(config, ranks)
        answers = answers or mine
        agreement = statistics.mean(a == b for a, b in zip(mine, answers, strict=True))
        rows[name] = {"loss": loss, "agreement": agreement, "accuracy": accuracy, "retain": retain, "seconds": seconds}
        print(
            f"seed {seed}  {name:28} " + "  ".join(f"{key} {value:.3f}" for key, value in rows[name].items()),
            flush=True,
        )
    return rows


def summarise(seeds: list[dict[str, dict[str, float]]]) -> tuple[str, dict[str, float]]:
    """The table over seeds, and gap, noise and the share of the gap that came back."""
    table = []
    for name in ROWS:
        values = {key: [rows[name][key] for rows in seeds] for key in ("loss", "agreement", "accuracy", "retain")}
        table.append(
            {"": name}
            | {"retain ratio": f"{values['retain'][0]:.1%}"}
            | {"held-out loss": _mean_and_spread(values["loss"], ".3f")}
            | {"agreement with Full": _mean_and_spread(values["agreement"], ".1%")}
            | {"accuracy": _mean_and_spread(values["accuracy"], ".1%")}
        )
    facts = {}
    for key in ("loss", "agreement"):
        gaps = [rows[ROWS[1]][key] - rows[ROWS[0]][key] for rows in seeds]
        facts[f"{key}_gap"] = statistics.mean(gaps)
        facts[f"{key}_noise"] = statistics.stdev(rows[ROWS[0]][key] for rows in seeds) if len(seeds) > 1 else 0.0
        facts[f"{key}_gap_spread"] = statistics.stdev(gaps) if len(seeds) > 1 else 0.0
        for row, short in ((ROWS[2], "ce"), (ROWS[3], "kd")):
            left = [rows[row][key] - rows[ROWS[0]][key] for rows in seeds]
            facts[f"{key}_recovered_by_{short}"] = 1 - statistics.mean(left) / facts[f"{key}_gap"]
    return markdown_table(table), facts


def _mean_and_spread(values: list[float], form: str) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):{form}} ± {spread:{form}}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("runs/kd_recovery"))
    parser.add_argument("--full-steps", type=int, default=120, help="steps of the full-token model")
    parser.add_argument("--full-lr", type=float, default=2e-3)
    parser.add_argument("--steps", type=int, default=120, help="steps of recovery, for CE and KD alike")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--no-record", action="store_true", help="try something without writing a record")
    settings = parser.parse_args()
    if not is_rank():
        sys.exit(run_as_rank("benchmarks.kd_recovery", sys.argv[1:]))
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    started = time.perf_counter()
    shutil.rmtree(settings.folder, ignore_errors=True)
    make_screens(settings.folder)
    ranks = join_ranks()
    seeds = [one_seed(settings.folder, seed, ranks, settings) for seed in range(settings.seeds)]
    table, facts = summarise(seeds)
    facts["minutes"] = (time.perf_counter() - started) / 60
    noise = facts["loss_noise"]
    verdict = (
        f"Gap in held-out loss {facts['loss_gap']:.3f}, {facts['loss_gap'] / noise if noise else 0:.1f} times the "
        f"standard deviation over seeds of the Full model's loss ({noise:.3f}). Won back of the gap in loss: "
        f"CE {facts['loss_recovered_by_ce']:.0%}, KD {facts['loss_recovered_by_kd']:.0%}; in agreement with Full: "
        f"CE {facts['agreement_recovered_by_ce']:.0%}, KD {facts['agreement_recovered_by_kd']:.0%}. "
        f"{facts['minutes']:.1f} minutes."
    )
    print(f"\n{table}\n\n{verdict}")
    if not settings.no_record:
        options = {key: str(value) if isinstance(value, Path) else value for key, value in vars(settings).items()}
        write_record("kd_recovery", {"settings": options, "facts": facts, "seeds": seeds}, f"{table}\n\n{verdict}")


if __name__ == "__main__":
    main()
