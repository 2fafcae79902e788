"""The debug recipe on records made here: started as a user starts it, and its exported model measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from tests.conftest import screen
from tests.ranks import ROOT

NUM_TRAIN, NUM_EVAL = 12, 4


def write_records(folder: Path, split: str, number: int) -> Path:
    path = folder / f"{split}.jsonl"
    with path.open("w") as file:
        for i in range(number):
            image = f"{split}{i}.png"
            Image.fromarray(screen(3, 4 + i % 3, i + 100 * (split == "eval"))).save(folder / image)
            content = [{"type": "image", "image": image}, {"type": "text", "text": f"Where is item {i}?"}]
            messages = [{"role": "user", "content": content}, {"role": "assistant", "content": f"({37 * i}, 8)"}]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def overrides(data: Path, model: Path, runs: Path, *more: str) -> list[str]:
    return [
        f"model.path={model}",
        f"data.sources.0.path={data / 'train.jsonl'}",
        f"data.eval_sources.0.path={data / 'eval.jsonl'}",
        f"run.folder={runs}",
        "resize.min_pixels=1024",
        "data.samples_per_step=6",
        *more,
    ]


def call(module: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


def held_out_loss(folder: Path, data: Path) -> float:
    """Mean cross-entropy on the held-out records of the model that `from_pretrained` loads from `folder`."""
    from pixelprune.pack import VisionGeometry, model_inputs
    from pixelprune.records.collator import PixelPruneCollator
    from pixelprune.settings import PruneSettings, ResizeSettings

    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    collator = PixelPruneCollator.from_pretrained(
        str(folder), prune=PruneSettings(), resize=ResizeSettings(min_pixels=1024), root=data
    )
    records = [json.loads(line) for line in (data / "eval.jsonl").read_text().splitlines()]
    pack = collator.pack([collator.preparer.prepare(record, data).sample for record in records])
    inputs = model_inputs(pack, VisionGeometry.from_config(model.config), torch.float32)
    with torch.no_grad():
        logits = model(**inputs, logits_to_keep=pack.logit_index).logits[0]
    return torch.nn.functional.cross_entropy(logits, pack.labels).item()
