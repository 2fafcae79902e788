"""The memory estimate against what autograd saves, the policy it picks, and that no policy changes a result."""

from __future__ import annotations

import itertools
import logging

import pytest
import torch
from transformers import AutoModelForImageTextToText

from pixelprune.attention.prefixes import find_groups
from pixelprune.model_call import final_hidden
from pixelprune.pack import Pack, VisionGeometry, pack_samples
from tests.conftest import screen
from tests.pixelprune.reference import make_sample
from training.config.settings import AUTO, Config, ModelSettings
from training.loop.memory import (
    USABLE,
    Recomputation,
    cache_bytes,
    choose_recomputation,
    estimate_memory,
    llm_bytes,
    recompute_flops,
    vit_bytes,
)
from training.model.attention import load_pretrained
from training.model.loading import enable_recomputation
from training.model.parameters import freeze_parts

TOLERANCE = 0.15


def full_pack(tokenizer, geometry: VisionGeometry) -> Pack:
    samples = [
        make_sample(tokenizer, [screen(9, 12)], "Where?", "there " * 40, strategy="none"),
        make_sample(tokenizer, [screen(10, 14, 2)], "And?", "a " * 30, strategy="none"),
    ]
    return pack_samples(samples, geometry)


def saved_bytes(model, pack: Pack, geometry: VisionGeometry) -> dict[str, int]:
    """Bytes that a forward keeps for backward, by tower: each storage once, weights not counted.

    Non-reentrant checkpointing hides what it will recompute from the hooks; the inputs it keeps are counted here.
    """
    tower, storages = ["vit"], {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages.setdefault(storage.data_ptr(), (tower[0], storage.nbytes(), storage))
        return tensor

    def keep_inputs(layer, args) -> None:
        if layer.gradient_checkpointing:
            keep(args[0])

    hooks = [model.model.language_model.register_forward_pre_hook(lambda *_: tower.__setitem__(0, "llm"))]
    layers = [*model.model.visual.blocks, *model.model.language_model.layers]
    hooks += [layer.register_forward_pre_hook(keep_inputs) for layer in layers]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = final_hidden(model, pack, geometry)
    for hook in hooks:
        hook.remove()
    assert output.requires_grad
    return {name: sum(size for where, size, _ in storages.values() if where == name) for name in ("vit", "llm")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("every", [0, 2, 1], ids=["none", "every second", "all"])
def test_activations_are_what_autograd_saves(dtype, every, toy_folder, toy_tokenizer):
    model = load_pretrained(str(toy_folder), attention="sdpa", dtype=dtype).train()
    geometry = VisionGeometry.from_config(model.config)
    enable_recomputation(model, ModelSettings(recompute_vit=every, recompute_llm=every))
    pack = full_pack(toy_tokenizer, geometry)
    measured = saved_bytes(model, pack, geometry)
    vit = vit_bytes(model.config.vision_config, pack.num_patches, dtype.itemsize, "sdpa").saved(every)
    llm = llm_bytes(model.config.text_config, pack.num_tokens, dtype.itemsize, "sdpa").saved(every)
    assert vit == pytest.approx(measured["vit"], rel=TOLERANCE)
    assert llm == pytest.approx(measured["llm"], rel=TOLERANCE)


def test_keys_in_front_of_suffixes_are_counted(toy_folder, toy_tokenizer, geometry):
    asked = [("Where? " * number, "There.") for number in range(1, 9)]
    samples = [make_sample(toy_tokenizer, [screen(9, 12)], *texts, strategy="none") for texts in asked]
    pack = pack_samples(samples, geometry, find_groups(samples, geometry.image_token_id))
    model = load_pretrained(str(toy_folder), attention="sdpa", dtype=torch.float32).train()
    measured = saved_bytes(model, pack, geometry)["llm"]
    gathered, text = sum(pack.borders.key_lengths[1:]), model.config.text_config
    estimated = llm_bytes(text, pack.num_tokens, 4, "sdpa", gathered_keys=gathered).saved(0)
    assert estimated == pytest.approx(measured, rel=TOLERANCE)
    assert llm_bytes(text, pack.num_tokens, 4, "sdpa").saved(0) < (1 - TOLERANCE) * measured
    assert llm_bytes(text, pack.num_tokens, 4, "varlen", gathered_keys=gathered).saved(0) < estimated


POLICIES = [pair for pair in itertools.product((0, 2, 1), (0, 2, 1)) if pair != (0, 0)]


@pytest.mark.parametrize("policy", POLICIES, ids=[f"vit {vit}, llm {llm}" for vit, llm in POLICIES])
def test_no_policy_changes_loss_or_gradients(policy, toy_folder, toy_tokenizer, geometry):
    pack = full_pack(toy_tokenizer, geometry)
    results = []
    for vit, llm in ((0, 0), policy):
        model = load_pretrained(str(toy_folder), attention="sdpa", dtype=torch.float32).train()
        enable_recomputation(model, ModelSettings(recompute_vit=vit, recompute_llm=llm))
        loss = final_hidden(model, pack, geometry).square().mean()
        loss.backward()
        results.append((loss, {name: p.grad for name, p in model.named_parameters()}))
    (loss, gradients), (other_loss, other_gradients) = results
    assert torch.equal(loss, other_loss)
    for name, gradient in gradients.items():
        if gradient is None:
            assert other_gradients[name] is None
        else:
            assert torch.equal(gradient, other_gradients[name]), name


@pytest.fixture(scope="module")
def big() -> torch.nn.Module:
    """Qwen3-VL-2B without its memory: shapes of the published config."""
    from benchmarks.parts.shapes import shape_config

    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(shape_config("2b"), dtype=torch.bfloat16)


def choose(model, gigabytes: float, config: Config | None = None, **kwargs):
    settings = {"world_size": 1, "attention": "varlen"} | kwargs
    return choose_recomputation(config or Config(), model, available=gigabytes * 1e9, **settings)


def test_the_cheapest_policy_that_fits_is_chosen(big):
    """Less memory, more recomputation: from none to all, never more than needed."""
    config = Config()
    plans = [choose(big, gigabytes) for gigabytes in range(40, 200, 8)]
    flops = [recompute_flops(_cost(big), config, big.config, plan.policy) for plan in plans]
    assert flops == sorted(flops, reverse=True)
    assert plans[0].policy == Recomputation(1, 1)
    assert plans[-1].policy == Recomputation(0, 0)
    assert len({plan.policy for plan in plans}) > 3
    for plan in plans:
        cheaper = [
            estimate_memory(config, big, Recomputation(vit, llm), world_size=1, attention="varlen").total
            for vit, llm in itertools.product((0, 4, 3, 2, 1), repeat=2)
            if recompute_flops(_cost(big), config, big.config, Recomputation(vit, llm))
            < recompute_flops(_cost(big), config, big.config, plan.policy)
        ]
        assert all(total > USABLE * plan.available for total in cheaper)


def test_what_the_recipe_says_stays(big):
    config = Config(model=ModelSettings(recompute_vit=3))
    assert {choose(big, gigabytes, config).policy.vit for gigabytes in (40, 80, 200)} == {3}
    assert choose(big, 200, config).policy.llm == 0


def test_too_little_memory_is_said(big, caplog):
    with caplog.at_level(logging.WARNING):
        plan = choose(big, 10)
    assert plan.policy == Recomputation(1, 1)
    assert "lower data.pack_tokens or data.pack_patches" in caplog.text


def test_the_static_part_is_counted_by_hand(big):
    """ZeRO-2 in bfloat16: 2 bytes a weight; 12 of optimizer and 4 of gradients a trained weight over the ranks."""
    num_weights = sum(p.numel() for p in big.parameters())
    config = Config()
    estimate = estimate_memory(config, big, Recomputation(1, 1), world_size=8, attention="varlen", teacher_weights=1000)
    assert estimate.weights == 2 * num_weights
    assert estimate.optimizer == 12 * num_weights / 8
    assert estimate.gradients == 4 * num_weights / 8 + (3 * 2 + 4) * config.distributed.reduce_bucket_size
    assert estimate.teacher == 2 * 1000


def test_the_cache_of_answers_is_what_the_stock_generation_holds(toy_folder):
    model = AutoModelForImageTextToText.from_pretrained(toy_folder).eval()
    config = Config(model=ModelSettings(path=str(toy_folder), dtype="float32"))
    config.kd.on_policy_batch_size, config.kd.on_policy_max_new_tokens, config.data.pack_tokens = 3, 4, 3 * 7
    ids = torch.arange(3 * 7).view(3, 7) + 5
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=4 + 1, min_new_tokens=4 + 1, do_sample=False,
        return_dict_in_generate=True,
    )  # fmt: skip
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in output.past_key_values.layers)
    assert cache_bytes(config, model.config.text_config, 4) == held, "of all tokens but the last, which nothing follows"


def test_the_cache_of_answers_counts_where_it_exceeds_the_step(big):
    config = Config()
    config.kd.on_policy, config.kd.on_policy_max_new_tokens = 1.0, 2**20

    def estimate(share: float):
        config.kd.on_policy = share
        return estimate_memory(config, big, Recomputation(1, 1), world_size=1, attention="varlen")

    step = estimate(0.0)
    assert step.generation == 0
    cache = cache_bytes(config, big.config.text_config, 2)
    assert estimate(1.0).generation == cache - (step.vit + step.llm + step.workspace) > 0
    config.kd.on_policy_max_new_tokens = 1
    assert estimate(1.0).generation == 0


def test_a_frozen_vit_keeps_nothing(big):
    config = Config()
    before = estimate_memory(config, big, Recomputation(0, 0), world_size=1, attention="varlen")
    config.optim.vit.freeze = True
    freeze_parts(big, config.optim)
    after = estimate_memory(config, big, Recomputation(0, 0), world_size=1, attention="varlen")
    big.requires_grad_(True)
    assert after.vit < 0.1 * before.vit
    assert after.optimizer < before.optimizer


def test_sdpa_pays_for_no_mask_of_the_row(big):
    """A packed row of 16,384 tokens would have a mask of 2^28 numbers in every layer; it runs sample by sample."""
    layers = big.config.text_config.num_hidden_layers
    estimates = [
        estimate_memory(Config(), big, Recomputation(0, 0), world_size=1, attention=name).llm
        for name in ("sdpa", "varlen")
    ]
    assert 0 <= estimates[0] - estimates[1] < 0.2 * 2 * 2**28 * layers


def test_families_without_formulas_recompute_everything(tmp_path):
    from training.composition.toy import build_tokenizer, toy_config

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(toy_config(build_tokenizer(), "qwen3_5"))
    plan = choose(model, 1000)
    assert (plan.policy, plan.estimate) == (Recomputation(1, 1), None)
    assert Config().model.recompute_vit == AUTO


def _cost(model):
    from pixelprune.flops import CostModel

    return CostModel.from_config(model.config)
