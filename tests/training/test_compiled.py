"""Compiled layers: the results of the plain ones, within the bound on versions, with and without recomputation.

Most tests take the backend aot_eager: it traces, guards and differentiates like the default one, and skips the kernels,
whose C++ takes a minute to compile on a small machine.
"""

from __future__ import annotations

import copy
import logging
import shutil

import pytest
import torch
from torch._dynamo.utils import counters

from pixelprune.attention.segments import use_borders
from pixelprune.model_call import final_hidden
from pixelprune.pack import Pack, pack_samples
from tests.conftest import screen
from tests.pixelprune.reference import make_sample
from tests.ranks import run_ranks
from training.config.settings import ModelSettings
from training.model.compiled import compile_layers
from training.model.loading import enable_recomputation

BOUND = 8
TOLERANCE = 1e-5
"""Of a tensor's largest entry: float32, the same sums in another order (fused kernels, one product for another)."""


@pytest.fixture(autouse=True)
def _fresh_compiler():
    """Versions and limits belong to the process."""
    dynamo = torch._dynamo.config
    limits = (dynamo.recompile_limit, dynamo.accumulated_recompile_limit)
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    dynamo.recompile_limit, dynamo.accumulated_recompile_limit = limits


def packs(tokenizer, geometry) -> list[Pack]:
    """Three lengths, with other images and sample counts."""
    groups = [
        [([screen(3, 5)], "Where?", "there"), ([screen(4, 6, 2)], "q", "a a")],
        [([screen(5, 5)], "Where is it?", "there " * 5), ([screen(2, 3, 2)], "q", "a"), ([], "Why?", "Because.")],
        [([screen(4, 7, 1), screen(3, 3)], "Compare.", "same " * 9), ([screen(2, 8)], "q", "no")],
    ]
    return [pack_samples([make_sample(tokenizer, *parts) for parts in group], geometry) for group in groups]


def loss_and_gradients(model, pack: Pack, geometry) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    hidden = final_hidden(model, pack, geometry)
    loss = (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum()
    loss.backward()
    return hidden.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_equal_runs(model, plain, pack: Pack, geometry) -> None:
    hidden, gradients = loss_and_gradients(model, pack, geometry)
    expected_hidden, expected = loss_and_gradients(plain, pack, geometry)
    assert gradients.keys() == expected.keys()
    pairs = {"hidden": (hidden, expected_hidden)} | {name: (gradients[name], expected[name]) for name in expected}
    for name, (actual, reference) in pairs.items():
        difference = (actual - reference).abs().max() / reference.abs().max().clamp_min(1e-30)
        assert difference < TOLERANCE, f"{name}: {difference:.1e}"


def most_versions() -> int:
    """Of any piece of code."""
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list
    from transformers.models.qwen3_vl import modeling_qwen3_vl as stock

    codes = [
        stock.Qwen3VLTextDecoderLayer.forward.__wrapped__.__code__,
        stock.Qwen3VLVisionBlock.forward.__wrapped__.__code__,
        stock.Qwen3VLVisionAttention.forward.__code__,
    ]
    return max(len(_debug_get_cache_entry_list(code)) for code in codes)


@pytest.mark.parametrize("by_segment", [False, True])
def test_compiled_equals_eager_within_the_bound(by_segment, toy_model, toy_tokenizer, geometry):
    """Every second layer is recomputed: kept and recomputed layers share their program, whatever the segments are."""
    plain = copy.deepcopy(toy_model).train()
    if by_segment:
        use_borders(plain)
    model = copy.deepcopy(plain)
    enable_recomputation(model, ModelSettings(recompute_vit=2, recompute_llm=2))
    compile_layers(model, BOUND, backend="aot_eager")
    for pack in packs(toy_tokenizer, geometry):
        assert_equal_runs(model, plain, pack, geometry)
    assert counters["stats"]["unique_graphs"] > 0, "nothing was compiled"
    # Two towers and a graph break at the images' loop: a version for three lengths, one more where a mask is missing.
    assert 0 < most_versions() <= 3
    before = counters["stats"]["unique_graphs"]
    for pack in packs(toy_tokenizer, geometry):
        loss_and_gradients(model, pack, geometry)
    assert counters["stats"]["unique_graphs"] == before, "known lengths were compiled again"


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="needs a C++ compiler")
def test_the_default_backend_equals_eager(toy_model, toy_tokenizer, geometry):
    """Text alone: the language model's kernels, for two lengths."""
    plain, model = copy.deepcopy(toy_model).train(), copy.deepcopy(toy_model).train()
    compile_layers(model, BOUND)
    for answer in ("Because.", "That took long to find. " * 3):
        pack = pack_samples([make_sample(toy_tokenizer, [], "Why?", answer)], geometry)
        assert_equal_runs(model, plain, pack, geometry)
    assert counters["stats"]["unique_graphs"] == 1


def test_reaching_the_bound_is_said_and_stays_right(toy_model, toy_tokenizer, geometry, caplog):
    """One version: the row with one sample, which has no mask, is a second one and runs uncompiled."""
    plain, model = copy.deepcopy(toy_model).train(), copy.deepcopy(toy_model).train()
    compile_layers(model, 1, backend="aot_eager")
    one_sample = pack_samples([make_sample(toy_tokenizer, [screen(3, 4)], "Where?", "there")], geometry)
    with caplog.at_level(logging.WARNING, logger="training.model.compiled"):
        for pack in (packs(toy_tokenizer, geometry)[0], one_sample):
            assert_equal_runs(model, plain, pack, geometry)
    said = [record.getMessage() for record in caplog.records if record.name == "training.model.compiled"]
    assert any("further cases run uncompiled" in line and "model.compile_max_recompiles" in line for line in said)
    assert most_versions() == 1


@pytest.mark.ranks
def test_varlen_recomputed_and_compiled_layers_train_under_zero(toy_folder, tmp_path):
    """All at once through two optimizer steps of DeepSpeed, beside plain layers."""
    results = run_ranks("tests.training.layers_program", 1, tmp_path / "out.json", str(toy_folder))
    for step, expected in zip(results["fast"], results["plain"], strict=True):
        assert step["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert step["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)


@torch.no_grad()
def test_evaluation_and_generation_run_uncompiled(toy_model, toy_tokenizer, geometry):
    model = copy.deepcopy(toy_model)
    pack = packs(toy_tokenizer, geometry)[0]
    before = final_hidden(model, pack, geometry)
    compile_layers(model, BOUND, backend="aot_eager")
    assert torch.equal(final_hidden(model.eval(), pack, geometry), before)
    batch = toy_tokenizer(["Open the menu"], return_tensors="pt")
    model.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=3)
    assert counters["stats"]["unique_graphs"] == 0


def test_only_this_model_is_compiled(toy_model):
    model = copy.deepcopy(toy_model)
    compile_layers(model, BOUND, backend="aot_eager")
    assert "forward" in vars(model.model.language_model.layers[0])
    assert "forward" not in vars(toy_model.model.language_model.layers[0])
    assert model.state_dict().keys() == toy_model.state_dict().keys()
