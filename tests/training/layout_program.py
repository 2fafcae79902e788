"""Runs on every rank of test_fragments.py: is every trained weight where a checkpoint looks for it?"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from tests.ranks import without_launcher_arguments
from training.config.settings import Config
from training.distributed import engine as engine_module
from training.distributed.engine import build_engine
from training.distributed.fragments import num_adam_steps, own_fragments
from training.distributed.ranks import join_ranks, leave_ranks
from training.errors import UserError
from training.exit_codes import leave_process


class Layers(nn.Module):
    """Matrices of different sizes, whose places in a flat partition are easily mixed up, and a vector."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Linear(8, 16, bias=False), nn.Linear(16, 24), nn.Linear(24, 8, bias=False), nn.Linear(8, 4, bias=False)
        ).to(dtype)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.layers(inputs).float().sum()


def assembled(engine) -> dict[str, torch.Tensor]:
    """Each trained parameter, flattened, put together from the weights in all ranks' pieces; NaN where none is."""
    mine = [(f.name, f.start, f.tensors["weight"].tolist()) for f in own_fragments(engine)]
    parts: list[list] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, mine)
    whole = {name: torch.full((p.numel(),), torch.nan) for name, p in engine.module.named_parameters()}
    for name, start, values in (piece for part in parts for piece in part):
        whole[name][start : start + len(values)] = torch.tensor(values)
    return whole


def is_whole(engine) -> bool:
    found = assembled(engine)
    return all(torch.equal(found[n].to(p.dtype), p.detach().flatten()) for n, p in engine.module.named_parameters())


def measure(dtype: str, zero_stage: int) -> dict:
    config = Config()
    config.model.dtype, config.distributed.zero_stage, config.optim.lr = dtype, zero_stage, 0.1
    ranks = join_ranks(config.distributed.timeout_minutes)
    module = Layers(torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    try:
        engine = build_engine(module, ranks, config.distributed, config.optim, config.model.dtype)
    except UserError as error:
        return {"refused": str(error)}
    result = {"before": is_whole(engine), "adam_steps_before": num_adam_steps(engine)}
    engine.set_gradient_accumulation_boundary(True)
    engine.backward(engine(torch.ones(2, 8, dtype=module.layers[0].weight.dtype)), scale_wrt_gas=False)
    engine.step()
    return result | {"after": is_whole(engine), "adam_steps_after": num_adam_steps(engine)}


def main() -> None:
    out, *_ = without_launcher_arguments(sys.argv[1:])
    torch.set_num_threads(1)
    results = {
        f"{dtype}, stage {stage}": measure(dtype, stage) for dtype in ("float32", "bfloat16") for stage in (1, 2)
    }
    # As a later DeepSpeed might lay weights out by default.
    generate = engine_module.deepspeed_json

    def with_round_robin(*arguments, **named):
        settings = generate(*arguments, **named)
        settings["zero_optimization"]["round_robin_gradients"] = True
        return settings

    engine_module.deepspeed_json = with_round_robin
    results["another layout"] = measure("float32", 2)
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(results))
    leave_ranks()
    leave_process(0)


if __name__ == "__main__":
    main()
