"""The table of families against the stock models it speaks of, and the adapters' targets that follow from it."""

from __future__ import annotations

import re

import pytest
import torch
from transformers import AutoModelForImageTextToText

from pixelprune.family import FAMILIES, lora_targets
from pixelprune.pack import VisionGeometry
from training.composition.toy import build_tokenizer, toy_config


@pytest.fixture(scope="module", params=list(FAMILIES))
def model(request):
    return AutoModelForImageTextToText.from_config(toy_config(build_tokenizer(), request.param))


def test_facts_are_those_of_the_stock_model(model):
    family, visual = FAMILIES[model.config.model_type], model.model.visual
    geometry = VisionGeometry.from_config(model.config)
    assert visual.interpolation_mode == geometry.interpolation_mode
    assert visual.interpolation_align_corners == geometry.align_corners
    assert visual.num_grid_per_side == geometry.num_grid_per_side
    assert hasattr(visual, "deepstack_merger_list") == family.deepstack
    modules = [name for name, _ in model.named_modules()]
    assert any(name.endswith("linear_attn") for name in modules) == family.linear_attention
    assert any(name.endswith("experts") for name in modules) == family.experts
    assert geometry.linear_attention == family.linear_attention


def test_lora_targets_are_all_linear_layers_of_the_parts(model):
    family = FAMILIES[model.config.model_type]
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    linear = {name for name in linear if name != "lm_head" and not name.endswith("shared_expert_gate")}
    inside = {
        "llm": {name for name in linear if ".visual." not in name},
        "vit": {name for name in linear if ".visual.blocks." in name},
        "merger": {name for name in linear if "merger" in name},
    }
    modules = [name for name, _ in model.named_modules()]
    for part, expected in inside.items():
        matched = {name for name in modules if re.fullmatch(lora_targets(family, [part]), name)}
        assert matched == expected
        assert expected
    everything = {name for name in modules if re.fullmatch(lora_targets(family, list(inside)), name)}
    assert everything == set.union(*inside.values()) == linear


def test_peft_adapts_the_targets():
    peft = pytest.importorskip("peft")
    hybrid = AutoModelForImageTextToText.from_config(toy_config(build_tokenizer(), "qwen3_5"))
    config = peft.LoraConfig(r=2, target_modules=lora_targets(FAMILIES["qwen3_5"], ["llm", "vit"]))
    adapted = peft.get_peft_model(hybrid, config)
    names = {name.removesuffix(".lora_A.default.weight") for name, _ in adapted.named_parameters() if "lora_A" in name}
    assert any(name.endswith("linear_attn.in_proj_qkv") for name in names)
    assert any(name.endswith("visual.blocks.0.attn.qkv") for name in names)
    assert len(names) == 2 * (4 + 3) + 2 * (5 + 3) + 4 * 4  # two layers of each kind, four vision blocks


def test_unknown_lora_parts_are_refused():
    with pytest.raises(ValueError, match="expected some of llm, vit, merger, got head"):
        lora_targets(FAMILIES["qwen3_5"], ["head"])
