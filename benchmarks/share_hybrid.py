"""A prefix that samples share in Qwen3.5, whose linear-attention layers are handed its state, beside samples apart.

    python -m benchmarks.share_hybrid [--questions 2 9 16] [--rounds 3]

Loss and gradient of one pack of questions about one screenshot: toy shape, float32, stock layers without compiled
kernels, on one thread. Apart is the pack with every sample for itself, in padded batches; vision encodes the picture
once (`data.share_vision`); prefix shares what the samples begin with (`data.share_prefix`). The ways take turns; CPU
time, medians. Before that, gradients are held to those of the samples one by one.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText

from benchmarks.parts.record import markdown_table, write_record
from benchmarks.share import write_questions
from benchmarks.step_stock import read_records
from pixelprune.attention.prefixes import find_groups
from pixelprune.attention.segments import use_borders
from pixelprune.pack import Pack, VisionGeometry, pack_samples, row_pictures
from pixelprune.records.prepare import PrepareSettings
from pixelprune.sample import Sample
from pixelprune.settings import PruneSettings, ResizeSettings
from training.composition.toy import build_toy_model
from training.loss.supervised import LossSettings
from training.model.supervised import SupervisedModel

TOLERANCE = 1e-5


def samples_of(folder: Path, model_folder: Path, num: int, megapixels: float) -> list[Sample]:
    path = write_questions(folder / "data", 1, num, megapixels, 0.4)
    preparer = PrepareSettings(str(model_folder), PruneSettings(), ResizeSettings()).build()
    rows = read_records(path)
    return [preparer.prepare(row, path.parent, record_id=record).sample for record, row in rows.items()]


def packs_of(samples: list[Sample], geometry: VisionGeometry) -> dict[str, Pack]:
    groups = find_groups(samples, geometry.image_token_id)
    return {
        "apart": pack_samples(samples, geometry),
        "vision": pack_samples(samples, geometry, pictures=row_pictures(samples)),
        "prefix": pack_samples(samples, geometry, groups, pictures=row_pictures(samples, groups)),
    }


def gradients_of(module: SupervisedModel, packs: list[Pack]) -> list[torch.Tensor]:
    module.zero_grad(set_to_none=True)
    for pack in packs:
        module(pack).total.backward()
    return [parameter.grad.clone() for parameter in module.parameters() if parameter.grad is not None]


def distance(gradients: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Relative, over all tensors together."""
    pairs = zip(gradients, expected, strict=True)
    difference = sum(float((a - b).square().sum()) for a, b in pairs)
    return (difference / sum(float(b.square().sum()) for b in expected)) ** 0.5


def measure(module: SupervisedModel, samples: list[Sample], rounds: int) -> dict[str, Any]:
    packs = packs_of(samples, module.geometry)
    exact = gradients_of(module, [pack_samples([sample], module.geometry) for sample in samples])
    differences = {way: distance(gradients_of(module, [pack]), exact) for way, pack in packs.items()}
    if max(differences.values()) > TOLERANCE:
        raise SystemExit(f"not the gradient of the samples one by one: {differences}")
    seconds: dict[str, list[float]] = {way: [] for way in packs}
    for _ in range(rounds):
        for way, pack in packs.items():
            begun = time.process_time()
            gradients_of(module, [pack])
            seconds[way].append(time.process_time() - begun)
    middle = {way: statistics.median(values) for way, values in seconds.items()}
    tokens = {way: pack.num_tokens for way, pack in packs.items()}
    return {"questions": len(samples), "tokens": tokens, "seconds": middle, "differences": differences}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, nargs="+", default=[2, 9, 16])
    parser.add_argument("--megapixels", type=float, default=0.2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-record", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = build_toy_model(Path(name) / "model", family="qwen3_5")
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).train()
        use_borders(model)
        module = SupervisedModel(model, VisionGeometry.from_config(model.config), LossSettings())
        rows = [
            measure(module, samples_of(Path(name) / str(num), folder, num, arguments.megapixels), arguments.rounds)
            for num in arguments.questions
        ]
    table = markdown_table(
        [
            {
                "questions": row["questions"],
                "tokens apart, shared": f"{row['tokens']['apart']:,}, {row['tokens']['prefix']:,}",
                "apart ms": f"{1000 * row['seconds']['apart']:.0f}",
                "vision": f"{row['seconds']['apart'] / row['seconds']['vision']:.2f}x",
                "prefix": f"{row['seconds']['apart'] / row['seconds']['prefix']:.2f}x",
                "gradient, prefix to one by one": f"{row['differences']['prefix']:.1e}",
            }
            for row in rows
        ]
    )
    sentence = (
        f"Toy Qwen3.5, float32, questions about one screenshot of {arguments.megapixels:g} megapixels, 40 % kept; "
        f"forward and backward, CPU time, medians of {arguments.rounds} rounds; vision and prefix: times as fast as "
        f"apart. Load average at the end: {os.getloadavg()[0]:.1f}."
    )
    print(sentence + "\n\n" + table)
    if not arguments.no_record:
        write_record("share_hybrid", {"settings": vars(arguments), "rows": rows}, sentence + "\n\n" + table)


if __name__ == "__main__":
    main()
