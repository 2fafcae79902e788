"""What we rely on in transformers. When a new release fails here, read its vision_utils before widening the range."""

from __future__ import annotations

import pytest
import torch

from pixelprune.family import FAMILIES, family_of
from pixelprune.pack import model_inputs, pack_samples
from tests.conftest import screen
from tests.pixelprune.reference import make_sample


def test_family_facts_are_those_of_the_stock_module(toy_model, geometry):
    visual = toy_model.model.visual
    assert visual.interpolation_mode == geometry.interpolation_mode
    assert visual.interpolation_align_corners == geometry.align_corners
    assert visual.num_grid_per_side == geometry.num_grid_per_side


def test_an_unknown_family_is_refused_by_name():
    class Config:
        model_type = "llava"

    with pytest.raises(ValueError, match=f"'llava' is not supported.*{sorted(FAMILIES)[0]}"):
        family_of(Config())


@pytest.mark.parametrize(
    "name",
    ["pixel_values", "image_position_ids", "image_interp_indices", "image_interp_weights", "image_cu_seqlens"],
)
@torch.no_grad()
def test_the_stock_forward_uses_every_precomputed_argument(name, toy_model, toy_tokenizer, geometry):
    """An argument that is silently ignored would make the model recompute geometry from our synthetic grid."""
    pack = pack_samples([make_sample(toy_tokenizer, [screen(3, 5), screen(4, 4)], "Where?", "(5, 8)")], geometry)
    inputs = model_inputs(pack, geometry, torch.float32)
    before = toy_model(**inputs).logits
    altered = inputs[name][[0, -1]] if name == "image_cu_seqlens" else inputs[name].flip(0)
    assert not torch.equal(before, toy_model(**(inputs | {name: altered})).logits)


@torch.no_grad()
def test_logits_to_keep_takes_an_index_tensor(toy_model, toy_tokenizer, geometry):
    pack = pack_samples([make_sample(toy_tokenizer, [screen(3, 5)], "Where?", "(5, 8)")], geometry)
    inputs = model_inputs(pack, geometry, torch.float32)
    kept = toy_model(**inputs, logits_to_keep=pack.logit_index).logits
    torch.testing.assert_close(kept, toy_model(**inputs).logits[:, pack.logit_index], atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_a_cache_makes_packed_samples_leak(toy_model, toy_tokenizer, geometry):
    """The trap behind `use_cache=False`; should it disappear, the rule may be relaxed."""
    samples = [make_sample(toy_tokenizer, [screen(3, 5, n)], "Where?", "(5, 8)") for n in (1, 2)]
    inputs = model_inputs(pack_samples(samples, geometry), geometry, torch.float32)
    assert inputs["use_cache"] is False
    leaking = toy_model(**(inputs | {"use_cache": True})).logits
    assert (leaking - toy_model(**inputs).logits).abs().max() > 1e-3
