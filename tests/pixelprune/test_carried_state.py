"""Shared prefixes in families with linear-attention layers: states handed on to every suffix, with their gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer

from pixelprune.attention.prefixes import find_groups
from pixelprune.attention.segments import use_borders
from pixelprune.model_call import final_hidden
from pixelprune.pack import VisionGeometry, pack_samples, row_pictures
from tests.kernels import needs_plain_layers
from tests.pixelprune.test_prefixes import cases, group_of, loss_and_gradients, tail_logits


@pytest.fixture(scope="module", params=["qwen3_5", "qwen3_5_moe"])
def hybrid(request, tmp_path_factory):
    from training.composition.toy import build_toy_model

    needs_plain_layers(request.param)
    folder = build_toy_model(tmp_path_factory.mktemp(request.param) / "model", family=request.param)
    model = AutoModelForImageTextToText.from_pretrained(folder).train()
    use_borders(model)
    return model, AutoTokenizer.from_pretrained(folder), VisionGeometry.from_config(model.config)


def distance(gradients, expected) -> float:
    """Relative, over all tensors together."""
    assert gradients.keys() == expected.keys()
    difference = sum((gradients[name] - expected[name]).square().sum() for name in expected)
    return float((difference / sum(gradient.square().sum() for gradient in expected.values())).sqrt())


@pytest.mark.parametrize(
    "case", ["several groups, interleaved, and one alone", "an image behind the prefix", "one-token suffixes"]
)
def test_a_shared_row_equals_rows_apart(hybrid, case):
    model, tokenizer, geometry = hybrid
    samples, num_groups = cases(tokenizer)[case]
    groups = find_groups(samples, geometry.image_token_id)
    assert sum(len(group.members) > 1 for group in groups) == num_groups > 0
    with torch.no_grad():
        for number, tail in enumerate(tail_logits(model, samples, groups, geometry)):
            alone = model.lm_head(final_hidden(model, pack_samples(samples[number : number + 1], geometry), geometry))
            torch.testing.assert_close(tail, alone[len(alone) - len(tail) :], atol=1e-5, rtol=1e-5)
    loss, gradients, _ = loss_and_gradients(model, samples, geometry, groups)
    expected_loss, expected, _ = loss_and_gradients(model, samples, geometry)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert distance(gradients, expected) < 1e-5


@torch.no_grad()
def test_a_picture_that_stands_in_two_groups_is_encoded_once_as_well(toy_hybrid):
    model, tokenizer, geometry = toy_hybrid
    samples, _ = cases(tokenizer)["several groups, interleaved, and one alone"]
    groups = find_groups(samples, geometry.image_token_id)
    pictures = row_pictures(samples, groups)
    once = pack_samples(samples, geometry, groups, pictures=pictures)
    torch.testing.assert_close(
        final_hidden(model, once, geometry),
        final_hidden(model, pack_samples(samples, geometry, groups), geometry),
        atol=1e-5,
        rtol=1e-5,
    )


@pytest.fixture(scope="module")
def toy_hybrid(tmp_path_factory):
    from training.composition.toy import build_toy_model

    needs_plain_layers("qwen3_5")
    folder = build_toy_model(tmp_path_factory.mktemp("carried") / "model", family="qwen3_5")
    model = AutoModelForImageTextToText.from_pretrained(folder).train()
    use_borders(model)
    return model, AutoTokenizer.from_pretrained(folder), VisionGeometry.from_config(model.config)


def test_recomputed_layers_and_one_call_are_refused(toy_hybrid):
    model, tokenizer, geometry = toy_hybrid
    samples = group_of(tokenizer, 0, 2)
    pack = pack_samples(samples, geometry, find_groups(samples, geometry.image_token_id))
    with pytest.raises(ValueError, match="it takes several calls"):
        final_hidden(model, pack, geometry, in_one_call=True)
    model = copy.deepcopy(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(ValueError, match=r"set model\.recompute_llm=0"):
        final_hidden(model, pack, geometry)
    # Without a backward pass nothing is recomputed: held-out losses and teachers run as they are.
    with torch.no_grad():
        assert final_hidden(model.eval(), pack, geometry).shape[0] == pack.num_tokens
