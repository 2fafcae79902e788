"""Started as a rank by test_compiled.py: optimizer steps with plain layers, and with every faster way at once.

Arguments: OUT MODEL. Writes {"plain": [{"loss", "grad_norm"} per step], "fast": [...]}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from pixelprune.pack import pack_samples
from tests.ranks import without_launcher_arguments
from tests.training.step_program import make_samples
from training.config.settings import Config, ModelSettings, OptimSettings
from training.data.loader import START, MicroBatch
from training.distributed.engine import build_engine
from training.distributed.ranks import Ranks, join_ranks, leave_ranks
from training.exit_codes import leave_process
from training.loop.step import run_step
from training.model.compiled import compile_layers
from training.model.loading import enable_recomputation, load_model, load_model_files
from training.model.supervised import SupervisedModel
from training.tracking.meter import StepMeter

NUM_STEPS = 2


def train(settings: ModelSettings, attention: str, ranks: Ranks, *, compiled: bool) -> list[dict[str, float]]:
    """Steps of two micro-steps per rank, of uneven packs."""
    config = Config(model=settings, optim=OptimSettings(lr=1e-3, max_grad_norm=0.0))
    files = load_model_files(settings)
    model = load_model(settings, attention=attention, device=ranks.device)
    enable_recomputation(model, settings)
    if compiled:
        compile_layers(model, 8, backend="aot_eager")
    engine = build_engine(
        SupervisedModel(model, files.geometry, config.loss), ranks, config.distributed, config.optim, config.model.dtype
    )
    samples = make_samples(files.tokenizer, some_without_image=False)
    num_supervised = sum(sample.num_supervised for sample in samples)
    groups = [samples[:1], samples[1:4], samples[4:6], samples[6:]][ranks.rank :: ranks.world_size]
    meter, steps = StepMeter(ranks), []
    for step in range(NUM_STEPS):
        batches = [
            MicroBatch(
                pack_samples(group, files.geometry),
                step,
                number,
                is_boundary=number == len(groups) - 1,
                num_supervised=num_supervised,
                loss_weight=float(num_supervised),
                num_samples=len(samples),
                cursor=START,
                is_dummy=False,
            )
            for number, group in enumerate(groups)
        ]
        run_step(engine, batches, meter)
        steps.append({"loss": meter.finish()["loss"], "grad_norm": float(engine.get_global_grad_norm())})
    return steps


def main() -> None:
    out, path = without_launcher_arguments(sys.argv[1:])
    torch.set_num_threads(1)
    ranks = join_ranks()
    plain = ModelSettings(path=path, dtype="float32", recompute_vit=0, recompute_llm=0)
    fast = ModelSettings(path=path, dtype="float32", recompute_vit=2, recompute_llm=2)
    results = {
        "plain": train(plain, "sdpa", ranks, compiled=False),
        "fast": train(fast, "varlen", ranks, compiled=True),
    }
    if ranks.is_first:
        Path(out).write_text(json.dumps(results))
    leave_ranks()
    leave_process(0)


if __name__ == "__main__":
    main()
