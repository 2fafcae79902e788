"""Low-rank adapters on the language model and/or the vision tower, through peft, and their merged export."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import nn

from pixelprune.family import family_of, lora_targets
from training.config.ranges import BELOW_1, POSITIVE, at_least, check_fields
from training.errors import UserError

_MERGER = re.compile(r"\.(merger|deepstack_merger_list\.\d+)$")


@dataclass
class LoraSettings:
    """Train low-rank adapters instead of the weights of the chosen parts (Hu et al. 2021)."""

    rank: int = 0
    """Rank of the adapters; 0 trains the weights themselves."""
    alpha: float = 32.0
    """Adapters are scaled by alpha / rank."""
    dropout: float = 0.0
    """Dropout on the adapters' inputs."""
    llm: bool = True
    """Adapters on the language model's linear layers."""
    vit: bool = False
    """Adapters on the vision tower's linear layers."""
    train_merger: bool = False
    """Also train the merger's own weights (its learning rate: optim.merger.lr)."""
    merge_on_export: bool = True
    """Export the model with adapters added into its weights; otherwise the adapters are exported beside the base."""

    def __post_init__(self) -> None:
        check_fields(self, rank=at_least(0, " (0 = no adapters)"), alpha=POSITIVE, dropout=BELOW_1)


def add_adapters(model: nn.Module, lora: LoraSettings) -> None:
    """Put adapters into a stock model, in place, and freeze everything else. Does nothing at rank 0.

    Raises UserError when no part is chosen.
    """
    if lora.rank == 0:
        return
    from peft import LoraConfig, get_peft_model

    parts = [part for part, wanted in (("llm", lora.llm), ("vit", lora.vit)) if wanted]
    if not parts:
        raise UserError("lora: rank is above 0 but neither lora.llm nor lora.vit is on")
    targets = lora_targets(family_of(model.config), parts)
    peft_config = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets, bias="none"
    )
    # The wrapper is dropped: the stock model now holds the adapters, and its forward is still its own.
    get_peft_model(model, peft_config, autocast_adapter_dtype=False)
    if lora.train_merger:
        for name, module in model.named_modules():
            if _MERGER.search(name):
                module.requires_grad_(True)


@torch.no_grad()
def export_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict under stock names, adapters added to the weights they belong to (in float32, rounded once).

    The model itself is left as it is, so that training can go on.
    """
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "get_delta_weight")}
    weights = {}
    for name, tensor in model.state_dict().items():
        layer_name, _, rest = name.partition(".base_layer.")
        if ".lora_" in name:
            continue
        if rest == "weight" and layer_name in layers:
            layer = layers[layer_name]
            delta = sum(layer.get_delta_weight(adapter).float() for adapter in layer.active_adapters)
            tensor = (tensor.float() + delta).to(tensor.dtype).cpu()  # a layer at a time: the device may be full
        weights[f"{layer_name}.{rest}" if rest else name] = tensor
    return weights


def adapter_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The adapters and trained mergers alone, under the names that peft loads onto a base model."""
    mergers = tuple(f"{name}." for name in trained_mergers(model))
    return {
        f"base_model.model.{name.replace('.default.', '.')}": tensor
        for name, tensor in model.state_dict().items()
        if ".lora_" in name or name.startswith(mergers)
    }


def trained_mergers(model: nn.Module) -> list[str]:
    """Modules trained beside the adapters, whole: peft's `modules_to_save`."""
    return [
        name
        for name, module in model.named_modules()
        if _MERGER.search(name) and all(parameter.requires_grad for parameter in module.parameters())
    ]
