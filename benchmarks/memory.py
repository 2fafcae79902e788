"""What fits on which GPU by the project's own estimate (`training.loop.memory`), an estimate and no measurement.

    python -m benchmarks.memory

For each model, number of GPUs and memory of one of them: the recomputation with the fewest FLOPs whose estimate fills
at most 90 % of it, with full packs of the default caps; where none fits, the largest halved packs that do. bfloat16,
`varlen` attention, ZeRO-2, everything trained, or adapters of rank 16 on the language model. Families whose activations
are not estimated show their states (weights, optimizer, gradients) and what these leave.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, Qwen3_5Config, Qwen3_5MoeConfig, Qwen3VLMoeConfig

from benchmarks.parts.record import markdown_table
from benchmarks.parts.shapes import shape_config
from training.config.settings import Config
from training.loop.memory import USABLE, choose_recomputation, is_estimated, state_bytes
from training.model.lora import LoraSettings, add_adapters
from training.model.parameters import freeze_parts

GPUS = (24, 40, 80, 141)
"""Decimal gigabytes of one GPU."""
RANKS = (1, 8, 32)
HALVINGS = (1, 2, 4, 8)
"""Divisors of data.pack_tokens and data.pack_patches."""
_LARGE = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "num_position_embeddings": 2304}
_SMALL = {**_LARGE, "depth": 24, "hidden_size": 1024, "intermediate_size": 4096}
_HYBRID = {"vocab_size": 248320, "head_dim": 256, "linear_num_key_heads": 16}


def _hybrid(vision: dict, *, tied: bool, **text: Any) -> Qwen3_5Config:
    text = {**_HYBRID, **text, "tie_word_embeddings": tied}
    vision = {**vision, "out_hidden_size": text["hidden_size"]}
    return Qwen3_5Config(text_config=text, vision_config=vision, tie_word_embeddings=tied)


def models() -> Iterator[tuple[str, Any]]:
    """Name and config of the published sizes."""
    for size in ("2b", "4b", "8b"):
        yield f"Qwen3-VL-{size.upper()}", shape_config(size)
    text = {
        "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48, "num_attention_heads": 32,
        "num_key_value_heads": 4, "head_dim": 128, "moe_intermediate_size": 768, "num_experts": 128,
        "num_experts_per_tok": 8, "vocab_size": 151936, "tie_word_embeddings": False,
    }  # fmt: skip
    vision = {**_LARGE, "out_hidden_size": 2048, "deepstack_visual_indexes": [8, 16, 24]}
    yield "Qwen3-VL-30B-A3B", Qwen3VLMoeConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)
    yield "Qwen3.5-2B", _hybrid(
        _SMALL, tied=True, hidden_size=2048, intermediate_size=6144, num_hidden_layers=24, num_attention_heads=8,
        num_key_value_heads=2, linear_num_value_heads=16,
    )  # fmt: skip
    yield "Qwen3.5-4B", _hybrid(
        _SMALL, tied=True, hidden_size=2560, intermediate_size=9216, num_hidden_layers=32, num_attention_heads=16,
        num_key_value_heads=4, linear_num_value_heads=32,
    )  # fmt: skip
    yield "Qwen3.5-9B", _hybrid(
        _LARGE, tied=False, hidden_size=4096, intermediate_size=12288, num_hidden_layers=32, num_attention_heads=16,
        num_key_value_heads=4, linear_num_value_heads=32,
    )  # fmt: skip
    yield "Qwen3.5-27B", _hybrid(
        _LARGE, tied=False, hidden_size=5120, intermediate_size=17408, num_hidden_layers=64, num_attention_heads=24,
        num_key_value_heads=4, linear_num_value_heads=48,
    )  # fmt: skip
    text = {"hidden_size": 2048, "num_hidden_layers": 40, "num_attention_heads": 16, "num_key_value_heads": 2}
    text |= {**_HYBRID, "linear_num_value_heads": 32, "moe_intermediate_size": 512, "num_experts": 256}
    text |= {"shared_expert_intermediate_size": 512, "num_experts_per_tok": 8}
    yield "Qwen3.5-35B-A3B", Qwen3_5MoeConfig(text_config=text, vision_config={**_LARGE, "out_hidden_size": 2048})


def recipe(divisor: int = 1, *, lora: bool = False) -> Config:
    """The defaults in bfloat16, packs divided."""
    config = Config()
    data = dataclasses.replace(
        config.data, pack_tokens=config.data.pack_tokens // divisor, pack_patches=config.data.pack_patches // divisor
    )
    return dataclasses.replace(
        config,
        data=data,
        model=dataclasses.replace(config.model, dtype="bfloat16"),
        lora=LoraSettings(rank=16 if lora else 0),
    )


def cell(model: Any, gigabytes: int, num_ranks: int, *, lora: bool) -> str:
    """What of the recipe has to be set for this GPU, and what is then estimated; "no" where nothing fits."""
    available = gigabytes * 1e9
    if not is_estimated(model.config):
        states = sum(state_bytes(recipe(lora=lora), model, num_ranks).values())
        left = USABLE * available - states
        return f"{left / 1e9:.0f} left" if left > 0 else "no"
    for divisor in HALVINGS:
        config = recipe(divisor, lora=lora)
        plan = choose_recomputation(config, model, available=available, world_size=num_ranks, attention="varlen")
        assert plan.estimate is not None
        if plan.estimate.total <= USABLE * available:
            packs = "" if divisor == 1 else f", packs {config.data.pack_tokens:,}"
            return f"{plan.estimate.total / 1e9:.0f} ({plan.policy.vit}/{plan.policy.llm}{packs})"
    return "no"


def rows(name: str, hf_config: Any, num_ranks: int) -> Iterator[dict[str, str]]:
    """One row for full training and, for one GPU, one for adapters, which more GPUs change little."""
    for lora in (False, True) if num_ranks == 1 else (False,):
        config = recipe(lora=lora)
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(hf_config)
        num_weights = sum(p.numel() for p in model.parameters())
        freeze_parts(model, config.optim)
        add_adapters(model, config.lora)
        states = sum(state_bytes(config, model, num_ranks).values()) / 1e9
        cells = {f"{gpu} GB": cell(model, gpu, num_ranks, lora=lora) for gpu in GPUS}
        what = f"{name}, adapters" if lora else f"{name} ({num_weights / 1e9:.1f} B weights)"
        yield {"model": what, "states": f"{states:.1f}", **cells}


def tables() -> Iterator[tuple[str, str]]:
    """A heading and a table for each number of GPUs."""
    configs = list(models())
    for num_ranks in RANKS:
        found = [row for name, hf_config in configs for row in rows(name, hf_config, num_ranks)]
        yield f"{num_ranks} GPU{'s' if num_ranks > 1 else ''}", markdown_table(found)


def main() -> None:
    logging.disable(logging.WARNING)  # what does not fit stands in the table
    for heading, table in tables():
        print(f"**{heading}**\n\n{table}\n")


if __name__ == "__main__":
    main()
