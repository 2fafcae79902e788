"""Optimizer groups, the learning-rate schedule, and what DeepSpeed is told."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageTextToText, AutoTokenizer

from benchmarks.parts.shapes import shape_config
from pixelprune.family import FAMILIES
from pixelprune.model_call import final_hidden
from pixelprune.pack import VisionGeometry, pack_samples
from tests.conftest import screen
from tests.kernels import needs_plain_layers
from tests.pixelprune.reference import make_sample
from training.composition.toy import build_toy_model
from training.config.settings import Config, ConfigError, GroupSettings, OptimSettings, ScheduleSettings
from training.distributed.engine import bucket_elements, deepspeed_json
from training.model.parameters import count_parts, freeze_parts, lr_factor, parameter_groups

CPU, GPU = torch.device("cpu"), torch.device("cuda")


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


def generated(config: Config, device: torch.device, **more: int) -> dict:
    max_grad_norm, dtype = config.optim.max_grad_norm, config.model.dtype
    return deepspeed_json(config.distributed, device, dtype=dtype, max_grad_norm=max_grad_norm, **more)


def test_gradients_accumulate_in_float32_and_nothing_is_clipped_behind_the_back():
    config = Config()
    config.optim.max_grad_norm = 0.0
    settings = generated(config, CPU)
    assert settings["data_types"]["grad_accum_dtype"] == "fp32"
    assert settings["gradient_clipping"] == 0.0  # absent, DeepSpeed would clip to 1


def test_passthrough_is_merged_when_it_only_observes_or_carries():
    config = Config()
    config.distributed.deepspeed = {
        "zero_optimization": {"reduce_scatter": False},
        "comms_logger": {"enabled": True, "verbose": True},
        "communication_data_type": "fp32",
    }
    settings = generated(config, CPU)
    assert settings["zero_optimization"]["reduce_scatter"] is False
    assert settings["zero_optimization"]["stage"] == 2
    assert settings["comms_logger"] == {"enabled": True, "verbose": True}


@pytest.mark.parametrize(
    ("passed_on", "message"),
    [
        ({"zero_optimization": {"round_robin_gradients": True}}, "zero_optimization.round_robin_gradients: may change"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "zero_optimization.offload_optimizer: may"),
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage: .*allowed here: reduce_scatter, allgather"),
        ({"zero_optimization": 3}, "zero_optimization: may change"),
        ({"fp16": {"enabled": True}}, "fp16: may change"),
        ({"gradient_predivide_factor": 2.0}, "gradient_predivide_factor: .*allowed here: comms_logger"),
        ({"gradient_clipping": 0.5}, "gradient_clipping: .*generated from other sections"),
    ],
)
def test_passthrough_that_changes_results_or_checkpoints_is_refused(passed_on, message):
    config = Config()
    config.distributed.deepspeed = passed_on
    with pytest.raises(ConfigError, match=r"distributed\.deepspeed\." + message) as caught:
        generated(config, CPU)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("shape", "elements"), [("2b", 200_000_000), ("8b", 151_936 * 4_096)], ids=["tied head", "untied head"]
)
def test_a_gradient_that_others_follow_fits_the_bucket(shape, elements):
    """DeepSpeed frees a gradient above the bucket's size before its reduction, beside backward, has read it."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(shape_config(shape), dtype=torch.bfloat16)
    config = Config()
    wanted = config.distributed.reduce_bucket_size
    zero = generated(config, GPU, reduce_bucket_size=bucket_elements(wanted, model))["zero_optimization"]
    assert zero["overlap_comm"]
    assert zero["contiguous_gradients"]
    assert zero["reduce_bucket_size"] == elements
    model.lm_head.requires_grad_(False)
    assert bucket_elements(wanted, model) == 200_000_000
    model.requires_grad_(False)
    model.model.visual.merger.norm.requires_grad_(True)
    assert bucket_elements(wanted, model) == 2 * model.config.vision_config.hidden_size


@pytest.mark.parametrize("family", FAMILIES)
def test_a_gradient_that_others_follow_is_counted_in_every_family(family, tmp_path):
    """The embedding's may be larger than the bucket where nothing is computed between its reduction and the wait for
    it: where it is the last of backward. Hybrid rows without kernels embed after the vision tower has run."""
    needs_plain_layers(family)
    model = AutoModelForImageTextToText.from_pretrained(build_toy_model(tmp_path / "model", family=family)).train()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    model.resize_token_embeddings(4096)  # the largest weight, as in a real model
    trained = dict(model.named_parameters())
    names: list[str] = []
    for name, parameter in trained.items():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: names.append(name))
    geometry = VisionGeometry.from_config(model.config)
    pack = pack_samples([make_sample(tokenizer, [screen(3, 4)], "Where?", "there")], geometry)
    model.lm_head(final_hidden(model, pack, geometry)).square().mean().backward()
    assert any(".visual." in name for name in names)
    elements = {name: parameter.numel() for name, parameter in trained.items()}
    if names[-1] == "model.language_model.embed_tokens.weight":
        del elements[names[-1]]
    largest = max(elements, key=elements.get)
    assert ("embed_tokens" in largest) is FAMILIES[family].linear_attention, "the toy shows the difference"
    assert bucket_elements(1, model) == elements[largest]
