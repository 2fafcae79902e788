"""A model that a toy task trains in minutes: smaller than the toy model of the tests, in a real folder."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from training.composition.toy import build_toy_model

_TEXT = {
    "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 3,
    "num_key_value_heads": 1,
}  # fmt: skip
_VISION = {
    "depth": 2, "hidden_size": 64, "intermediate_size": 192, "num_heads": 2, "out_hidden_size": 96,
    "deepstack_visual_indexes": [0],
}  # fmt: skip


def make_small_model(folder: Path, texts: list[str], seed: int) -> Path:
    """Random weights of that seed and a tokenizer of `texts`, written to the folder."""
    build_toy_model(folder, texts, seed=seed)
    config = AutoConfig.from_pretrained(folder)
    for part, sizes in ((config.text_config, _TEXT), (config.vision_config, _VISION)):
        for name, value in sizes.items():
            setattr(part, name, value)
    torch.manual_seed(seed)
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    return folder
