"""Runs on every rank of test_step.py: optimizer steps of the same global batches, cut in different ways."""

from __future__ import annotations

import functools
import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import training.distributed.engine
from pixelprune.attention.prefixes import find_groups
from pixelprune.pack import pack_samples, row_pictures
from pixelprune.records.collator import dummy_sample
from tests.conftest import screen
from tests.pixelprune.reference import make_sample
from tests.ranks import without_launcher_arguments
from training.config.settings import Config, ModelSettings, OptimSettings
from training.data.loader import START, MicroBatch
from training.distributed.engine import build_engine
from training.distributed.ranks import Ranks, join_ranks, leave_ranks
from training.exit_codes import leave_process
from training.loop.step import run_step
from training.model.loading import enable_recomputation, load_model, load_model_files
from training.model.supervised import SupervisedModel
from training.tracking.meter import StepMeter

ANSWERS = [
    "(1, 2)",
    "A long answer that has many supervised tokens.",
    "(512, 87)",
    "no",
    "7",
    "(3, 3)",
    "yes",
    "(0, 0)",
]


DIFFERENT = tuple(range(len(ANSWERS)))
SCREENS = {
    "two screenshots": (0, 1) * 4,
    "two screenshots, shared": (0, 1) * 4,
    # On two ranks the one encodes pictures once, the other has none twice.
    "some screenshots twice": (0, 1, 0, 1, 2, 3, 4, 5),
    "some screenshots twice, encoded once": (0, 1, 0, 1, 2, 3, 4, 5),
}
"""Of each sample; different ones for other packings."""


def make_samples(tokenizer, *, some_without_image: bool, screens: Sequence[int] = DIFFERENT) -> list:
    """Eight samples of uneven length and supervised count; with `some_without_image`, the first four are text only."""
    return [
        make_sample(
            tokenizer,
            [] if some_without_image and number < 4 else [screen(3 + picture % 3, 4, picture)],
            "Where is Save?",
            answer,
            name=str(number),
        )
        for number, (answer, picture) in enumerate(zip(ANSWERS, screens, strict=True))
    ]


def train_three_steps(packing: str, model_path: str, ranks: Ranks, dtype: str = "float32") -> dict:
    """Loss and gradient norm of three optimizer steps from the same weights, the global batch cut by `packing`; a hash
    of the weights behind them."""
    config = Config(
        model=ModelSettings(path=model_path, dtype=dtype, recompute_vit=1, recompute_llm=1),
        optim=OptimSettings(lr=1e-3, max_grad_norm=0.0),
    )
    files = load_model_files(config.model)
    model = load_model(config.model, attention="sdpa", device=ranks.device)
    enable_recomputation(model, config.model)
    engine = build_engine(
        SupervisedModel(model, files.geometry, config.loss), ranks, config.distributed, config.optim, config.model.dtype
    )
    calls: list[int] = []
    for layers in (model.model.visual.blocks, model.model.language_model.layers):
        # A part of the layer: the layer's own hooks stay outside of the recomputation.
        next(layers[0].children()).register_forward_pre_hook(lambda *_: calls.append(1))
    meter = StepMeter(ranks)
    screens = SCREENS.get(packing, DIFFERENT)
    some_without_image = packing == "text beside images"
    samples = make_samples(files.tokenizer, some_without_image=some_without_image, screens=screens)
    num_supervised = sum(sample.num_supervised for sample in samples)
    if packing == "text beside images":
        # The rank with text-only samples has the dummy, which keeps ViT and merger in its backward.
        packs = [[*samples[:4], dummy_sample(files.geometry.image_token_id)], samples[4:]]
    else:
        size = {"one pack": 8, "four packs": 2}.get(packing, 4)
        packs = [samples[start : start + size] for start in range(0, 8, size)]
    mine = [
        pack_samples(
            pack,
            files.geometry,
            find_groups(pack, files.geometry.image_token_id) if packing == "two screenshots, shared" else None,
            pictures=row_pictures(pack) if packing.endswith("encoded once") else None,
        )
        for pack in packs[ranks.rank :: ranks.world_size]
    ]
    steps = []
    for step in range(3):
        batches = [
            MicroBatch(
                pack,
                step,
                number,
                is_boundary=number == len(mine) - 1,
                num_supervised=num_supervised,
                loss_weight=float(num_supervised),
                num_samples=len(samples),
                cursor=START,
                is_dummy=False,
            )
            for number, pack in enumerate(mine)
        ]
        run_step(engine, batches, meter)
        metrics = meter.finish()
        steps.append({"loss": metrics["loss"], "grad_norm": float(engine.get_global_grad_norm())})
    names = ("num_samples", "num_supervised", "shared_prefix", "shared_vision")
    counts = {name: metrics[name] for name in names}
    weights = hashlib.sha256(b"".join(p.detach().float().numpy().tobytes() for p in model.parameters())).hexdigest()
    return {"steps": steps, **counts, "weights": weights, "layer_calls_per_pack": len(calls) / (3 * 2 * len(mine))}


def _not_alone(make: Callable[..., dict], *args: Any, is_alone: bool, **kwargs: Any) -> dict:
    settings, alone = (make(*args, is_alone=one, **kwargs) for one in (False, is_alone))
    ways = [made["zero_optimization"]["contiguous_gradients"] for made in (settings, alone)]
    assert ways == [True, False], "the two ways differ"
    return settings


def main() -> None:
    out, model_path = without_launcher_arguments(sys.argv[1:])
    torch.set_num_threads(1)
    ranks = join_ranks()
    packings = ["four packs", "text beside images", "two screenshots, shared", "some screenshots twice, encoded once"]
    packings += ["one pack", "two screenshots", "some screenshots twice"] if ranks.world_size == 1 else []
    results = {packing: train_three_steps(packing, model_path, ranks) for packing in packings}
    if ranks.world_size == 1:
        # Gradients left where they are, and the copies that several ranks make.
        copying = functools.partial(_not_alone, training.distributed.engine.deepspeed_json)
        for dtype in ("float32", "bfloat16"):
            results[f"left, {dtype}"] = train_three_steps("four packs", model_path, ranks, dtype)
            with mock.patch.object(training.distributed.engine, "deepspeed_json", copying):
                results[f"copied, {dtype}"] = train_three_steps("four packs", model_path, ranks, dtype)
    if ranks.is_first:
        Path(out).write_text(json.dumps(results))
    leave_ranks()
    leave_process(0)


if __name__ == "__main__":
    main()
