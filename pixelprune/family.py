"""Facts about the supported model families that their configs do not state. One table, no code per family."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["FAMILIES", "Family", "family_of", "lora_targets"]


@dataclass(frozen=True)
class Family:
    """What the input builder and the trainer must know beyond the Hugging Face config.

    deepstack: features of inner vision layers are added to the first layers of the language model.
    linear_attention: some layers are gated delta nets behind a causal convolution. Both carry state along the row, so
        they need sample borders of their own; full-attention layers take them from positions or cumulative lengths.
    experts: mixture-of-experts MLPs. The router is trained through the loss like any weight; an auxiliary
        load-balancing loss is not added.
    interpolation_mode, align_corners: how the learned position grid of the vision tower is resampled (attributes of
        the stock vision module, checked against it by the seam test).
    """

    model_type: str
    deepstack: bool
    linear_attention: bool
    experts: bool
    interpolation_mode: str = "bilinear"
    align_corners: bool = True


FAMILIES = {
    family.model_type: family
    for family in (
        Family("qwen3_vl", deepstack=True, linear_attention=False, experts=False),
        Family("qwen3_vl_moe", deepstack=True, linear_attention=False, experts=True),
        Family("qwen3_5", deepstack=False, linear_attention=True, experts=False),
        Family("qwen3_5_moe", deepstack=False, linear_attention=True, experts=True),
    )
}


def family_of(config: Any) -> Family:
    """The family of a Hugging Face config. Raises ValueError naming the supported ones."""
    try:
        return FAMILIES[config.model_type]
    except KeyError:
        supported = ", ".join(sorted(FAMILIES))
        raise ValueError(f"model type {config.model_type!r} is not supported; expected one of: {supported}") from None


EXPERTS_INPUTS_FIRST = ("qwen3_vl_moe",)
"""Families whose published checkpoints store the weights of experts as (expert, inputs, outputs)."""


def published_layout(model_type: str, weights: dict[str, Any]) -> dict[str, Any]:
    """A stock model's tensors by name, as published checkpoints of the family store them.

    The stock class of EXPERTS_INPUTS_FIRST reads either layout and writes its own (transformers 5.19 to 5.23, whatever
    it is given unless `save_original_format=False`), which vLLM does not load.
    """
    if model_type not in EXPERTS_INPUTS_FIRST:
        return weights
    return {name: tensor.mT.contiguous() if ".mlp.experts." in name else tensor for name, tensor in weights.items()}


_LORA_ATTENTION = r"self_attn\.[qkvo]_proj"
_LORA_MLP = r"mlp\.(gate|up|down)_proj"
_LORA_DELTA_NET = r"linear_attn\.(in_proj_(qkv|z|b|a)|out_proj)"
_LORA_SHARED_EXPERT = r"mlp\.shared_expert\.(gate|up|down)_proj"


def lora_targets(family: Family, parts: Sequence[str] = ("llm",)) -> str:
    """Regular expression that full-matches the names of a family's linear layers, as PEFT's `target_modules` takes it.

    parts: any of llm (attention, MLP and delta-net projections of all layers), vit (blocks of the vision tower) and
    merger (main and DeepStack mergers). Left out: embeddings, output head, convolutions, routers, and the stacked
    weights of experts, which are parameters and not layers.
    Raises ValueError for an unknown part.
    """
    llm = [_LORA_ATTENTION, _LORA_MLP]
    llm += [_LORA_DELTA_NET] if family.linear_attention else []
    llm += [_LORA_SHARED_EXPERT] if family.experts else []
    mergers = r"(merger|deepstack_merger_list\.\d+)" if family.deepstack else "merger"
    patterns = {
        "llm": rf"language_model\.layers\.\d+\.({'|'.join(llm)})",
        "vit": r"visual\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.linear_fc[12])",
        "merger": rf"visual\.{mergers}\.linear_fc[12]",
    }
    unknown = [part for part in parts if part not in patterns]
    if unknown or not parts:
        raise ValueError(f"LoRA parts: expected some of {', '.join(patterns)}, got {', '.join(parts) or 'none'}")
    return rf"(.*\.)?({'|'.join(patterns[part] for part in parts)})"
