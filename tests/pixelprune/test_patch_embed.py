"""The patch embedding as a matrix product: what the stock convolution gives, forward and backward."""

import copy

import pytest
import torch
from torch import nn

from pixelprune.images.patch_embed import use_linear_patches
from training.composition.toy import FAMILIES, build_toy_model
from training.model.attention import load_pretrained


@pytest.mark.parametrize("family", FAMILIES)
def test_a_loaded_model_embeds_patches_as_the_stock_convolution(family, tmp_path):
    model = load_pretrained(
        str(build_toy_model(tmp_path / "model", family=family)), attention="sdpa", dtype=torch.float32
    )
    ours = model.model.visual.patch_embed
    stock = copy.deepcopy(ours)
    del stock.proj.forward  # back to the class's own
    patches = torch.randn(12, ours.proj.weight[0].numel())
    results = [part(patches) for part in (ours, stock)]
    # A dot product of 1,536 values of size 1, summed in another order.
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    upstream = torch.randn_like(results[0])
    for result in results:
        result.backward(upstream)
    for mine, theirs in zip(ours.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-4)
    assert [name for name, _ in ours.named_parameters()] == ["proj.weight", "proj.bias"]
    assert ours.proj.weight.ndim == 5, "what is saved is what the stock model loads"


def test_another_model_of_the_class_stays_stock(toy_model):
    other = copy.deepcopy(toy_model)
    use_linear_patches(other)
    assert "forward" not in vars(toy_model.model.visual.patch_embed.proj)


@pytest.mark.parametrize(
    "projection",
    [
        nn.Conv3d(3, 8, (2, 16, 16), stride=(2, 8, 16)),
        nn.Conv3d(3, 8, (2, 16, 16), stride=(2, 16, 16), padding=1),
        nn.Conv3d(4, 8, (2, 16, 16), stride=(2, 16, 16), groups=2),
        nn.Linear(1536, 8),
    ],
    ids=["overlap", "padding", "groups", "linear"],
)
def test_another_projection_is_refused(projection, toy_model):
    other = copy.deepcopy(toy_model)
    other.model.visual.patch_embed.proj = projection
    with pytest.raises(ValueError, match="expected a Conv3d whose stride is its kernel"):
        use_linear_patches(other)


def test_a_copy_embeds_with_its_own_weights(toy_model):
    model = copy.deepcopy(toy_model)
    use_linear_patches(model)
    other = copy.deepcopy(model)
    projection = other.model.visual.patch_embed.proj
    with torch.no_grad():
        projection.weight.zero_()
        projection.bias.fill_(2.0)
    assert (other.model.visual.patch_embed(torch.randn(3, 1536)) == 2.0).all()
    assert not (model.model.visual.patch_embed(torch.randn(3, 1536)) == 2.0).any()


def test_more_than_a_patch_is_refused(toy_model):
    other = copy.deepcopy(toy_model)
    use_linear_patches(other)
    with pytest.raises(ValueError, match=r"expected single patches of \(2, 16, 16\)"):
        other.model.visual.patch_embed.proj(torch.zeros(1, 3, 2, 32, 32))
