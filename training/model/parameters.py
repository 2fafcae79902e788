"""Which weights are trained, in which optimizer group, and how the learning rate moves."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn

from training.config.settings import ConfigError, OptimSettings, ScheduleSettings

PARTS = ("vit", "merger", "llm")
_LAYER = re.compile(r"\b(blocks\.\d+|layers\.\d+|merger|deepstack_merger_list\.\d+)\.")


@dataclass(frozen=True)
class PartCount:
    """Number of weights of one part of the model, and of its repeated layers."""

    part: str
    num_total: int
    num_trained: int
    num_layers: int
    """Layers of the stack (ViT blocks, decoder layers), or mergers."""
    layer_size: int
    """Weights of the largest of them."""
    lr: float


def part_of(name: str) -> str:
    """vit, merger (with the DeepStack mergers) or llm, from a stock parameter name."""
    if ".visual." not in f".{name}":
        return "llm"
    return "merger" if ".merger." in name or ".deepstack_merger_list." in name else "vit"


def freeze_parts(model: nn.Module, optim: OptimSettings) -> None:
    """Switch gradients off for the parts that the recipe freezes."""
    for name, parameter in model.named_parameters():
        if getattr(optim, part_of(name)).freeze:
            parameter.requires_grad_(False)


def trains_vision(model: nn.Module) -> bool:
    """Whether anything of the ViT or the mergers is trained, adapters included."""
    return any(parameter.requires_grad and part_of(name) != "llm" for name, parameter in model.named_parameters())


def parameter_groups(model: nn.Module, optim: OptimSettings) -> list[dict]:
    """AdamW groups: one per part and decay; norms, biases and embeddings are not decayed.

    Raises ConfigError when nothing is left to train.
    """
    undecayed = _undecayed_names(model)
    groups: dict[tuple[str, bool], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part, decays = part_of(name), name not in undecayed
        group = groups.setdefault(
            (part, decays),
            {
                "name": f"{part}{'' if decays else '_no_decay'}",
                "part": part,
                "params": [],
                "lr": part_lr(optim, part),
                "weight_decay": optim.weight_decay if decays else 0.0,
            },
        )
        group["params"].append(parameter)
    if not groups:
        raise ConfigError("optim: no parameter requires a gradient; unfreeze one of optim.vit, optim.merger, optim.llm")
    for group in groups.values():
        group["peak_lr"] = group["lr"]
    return list(groups.values())


def part_lr(optim: OptimSettings, part: str) -> float:
    own = getattr(optim, part).lr
    return optim.lr if own is None else own


def count_parts(model: nn.Module, optim: OptimSettings) -> list[PartCount]:
    """Weights per part, for the table at the start of a run."""
    counts = []
    for part in PARTS:
        layers: Counter[str] = Counter()
        total = trained = 0
        for name, parameter in model.named_parameters():
            if part_of(name) == part:
                total += parameter.numel()
                trained += parameter.numel() * parameter.requires_grad
                if layer := _LAYER.search(name):
                    layers[layer.group()] += parameter.numel()
        counts.append(
            PartCount(part, total, trained, len(layers), max(layers.values(), default=0), part_lr(optim, part))
        )
    return counts


def lr_factor(step: int, num_steps: int, schedule: ScheduleSettings) -> float:
    """Share of the peak learning rate for the 0-based optimizer step: linear warm-up, then cosine to min_lr_ratio."""
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    progress = (step - schedule.warmup_steps) / max(1, num_steps - 1 - schedule.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return schedule.min_lr_ratio + (1 - schedule.min_lr_ratio) * cosine


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> dict[str, float]:
    """Scale every group's peak rate; returns the rate per part for tracking."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    return {group["part"]: group["lr"] for group in optimizer.param_groups}


def _undecayed_names(model: nn.Module) -> set[str]:
    """Biases, every vector (norms, decay rates and step biases of delta nets), and embeddings, tied heads included.

    The depthwise convolution of a delta net is decayed, as in reference implementations of such layers, which exempt
    the decay rates and step biases only.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return {
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim < 2 or name.endswith(".bias") or id(parameter) in embeddings
    }
