"""Optimizer groups, the learning-rate schedule, and what DeepSpeed is told."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from training.config import Config, ConfigError, GroupSettings, OptimSettings, ScheduleSettings
from training.engine import deepspeed_json
from training.parameters import count_parts, freeze_parts, lr_factor, parameter_groups

CPU = torch.device("cpu")


def groups_by_name(model: nn.Module, optim: OptimSettings) -> dict[str, tuple[dict, set[str]]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {g["name"]: (g, {names[id(p)] for p in g["params"]}) for g in parameter_groups(model, optim)}


def test_norms_biases_and_embeddings_are_not_decayed(toy_model):
    groups = groups_by_name(toy_model, OptimSettings(weight_decay=0.3))
    decayed = {name for group, names in groups.values() if group["weight_decay"] for name in names}
    undecayed = {name for group, names in groups.values() if not group["weight_decay"] for name in names}
    assert decayed | undecayed == {name for name, _ in toy_model.named_parameters()}
    assert all(group["weight_decay"] in (0.0, 0.3) for group, _ in groups.values())
    for name, module in toy_model.named_modules():
        for part, parameter in module.named_parameters(prefix=name, recurse=False):
            if isinstance(module, nn.Embedding) or "norm" in type(module).__name__.lower() or part.endswith(".bias"):
                assert part in undecayed or (parameter.ndim > 1 and not isinstance(module, nn.Embedding)), part
            elif isinstance(module, nn.Linear) and module is not toy_model.lm_head:
                assert part in decayed, part


def test_parts_have_their_own_rates_and_freeze_alone(toy_folder):
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(toy_folder)
    optim = OptimSettings(lr=1.0, vit=GroupSettings(freeze=True), merger=GroupSettings(lr=0.25))
    freeze_parts(model, optim)
    groups = groups_by_name(model, optim)
    assert not any("visual.blocks" in name for _, names in groups.values() for name in names)
    mergers, _ = groups["merger"][0], groups["merger"][1]
    assert mergers["lr"] == 0.25
    assert any("deepstack_merger_list" in name for name in groups["merger"][1])
    assert groups["llm"][0]["lr"] == 1.0
    trained = {count.part: count.num_trained for count in count_parts(model, optim)}
    assert trained["vit"] == 0
    assert trained["merger"] > 0


def test_nothing_to_train_is_refused(toy_folder):
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(toy_folder)
    frozen = GroupSettings(freeze=True)
    optim = OptimSettings(vit=frozen, merger=frozen, llm=frozen)
    freeze_parts(model, optim)
    with pytest.raises(ConfigError, match="no parameter requires a gradient"):
        parameter_groups(model, optim)


def test_warm_up_and_cosine_by_hand():
    schedule = ScheduleSettings(warmup_steps=4, min_lr_ratio=0.1)
    factors = [lr_factor(step, 15, schedule) for step in range(15)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4] == 1.0
    # Ten steps of cosine from 1 to 0.1: half-way is their mean.
    assert factors[9] == pytest.approx(0.55)
    assert factors[14] == pytest.approx(0.1)
    assert factors[7] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(0.3 * math.pi)))
    assert factors == sorted(factors[:4]) + sorted(factors[4:], reverse=True)


def test_gradients_accumulate_in_float32_and_nothing_is_clipped_behind_the_back():
    config = Config()
    config.optim.max_grad_norm = 0.0
    settings = deepspeed_json(config, CPU)
    assert settings["data_types"]["grad_accum_dtype"] == "fp32"
    assert settings["gradient_clipping"] == 0.0  # absent, DeepSpeed would clip to 1


def test_passthrough_is_merged_and_may_not_contradict():
    config = Config()
    config.distributed.deepspeed = {
        "zero_optimization": {"round_robin_gradients": True},
        "comms_logger": {"enabled": True},
    }
    settings = deepspeed_json(config, CPU)
    assert settings["zero_optimization"]["round_robin_gradients"] is True
    assert settings["zero_optimization"]["stage"] == 2
    config.distributed.deepspeed = {"zero_optimization": {"stage": 3}}
    with pytest.raises(ConfigError, match=r"distributed\.deepspeed\.zero_optimization\.stage: 3 contradicts 2"):
        deepspeed_json(config, CPU)
