"""The input builder against stock inputs, a brute-force pruned model, and samples run apart."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from pixelprune.images.image import prune_image
from pixelprune.pack import model_inputs, normalise_blocks, pack_samples
from pixelprune.sample import Sample
from pixelprune.settings import PruneSettings, ResizeSettings
from tests.conftest import screen
from tests.pixelprune.reference import brute_force_logits, make_sample, stock_inputs, stock_processor

CASES = {
    "one image": ([screen(3, 5)], "Where is Save?", "(512, 87)"),
    "two images": ([screen(4, 3, 1), screen(2, 7, 2)], "Compare them.", "The second is wider."),
    "text only": ([], "What is 2 + 2?", "4"),
}


def logits_of(model, samples: list[Sample], geometry) -> torch.Tensor:
    return model(**model_inputs(pack_samples(samples, geometry), geometry, torch.float32)).logits[0]


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_keep_all_gives_bit_identical_logits_to_the_stock_call(case, toy_model, toy_tokenizer, geometry):
    images, question, answer = CASES[case]
    stock = toy_model(**stock_inputs(toy_tokenizer, images, question, answer), use_cache=False).logits[0]
    ours = logits_of(toy_model, [make_sample(toy_tokenizer, images, question, answer, "none")], geometry)
    assert torch.equal(ours, stock)


@pytest.mark.parametrize("case", ["one image", "two images"])
@torch.no_grad()
def test_pruned_equals_gathering_after_the_patch_embedding(case, toy_model, toy_tokenizer, geometry):
    images, question, answer = CASES[case]
    sample = make_sample(toy_tokenizer, images, question, answer)
    assert sum(i.selection.num_kept for i in sample.images) < sum(i.selection.num_blocks for i in sample.images)
    expected = brute_force_logits(toy_model, toy_tokenizer, images, sample.images, question, answer)
    # Same operations on the same rows; only the patch embedding runs on other matrix shapes (float32 rounding).
    torch.testing.assert_close(logits_of(toy_model, [sample], geometry), expected, atol=1e-5, rtol=1e-5)


def test_kept_patches_are_the_stock_processors_bit_for_bit(geometry):
    rng = np.random.default_rng(7)
    picture = Image.fromarray(rng.integers(0, 256, (211, 333, 3), dtype=np.uint8))
    resize = ResizeSettings(min_pixels=32 * 32)
    pruned = prune_image(picture, PruneSettings(), resize)
    stock = stock_processor()(images=[picture], return_tensors="pt")["pixel_values"]
    kept = torch.from_numpy(pruned.selection.keep.reshape(-1)).repeat_interleave(4)
    assert torch.equal(normalise_blocks(torch.from_numpy(pruned.blocks), geometry), stock[kept])


@pytest.fixture
def uneven_samples(toy_tokenizer) -> list[Sample]:
    """Different lengths, image counts and supervised counts."""
    texts = [("Where is Save?", "(512, 87)"), ("Say hello.", "Hello, and a longer answer than the others."), ("?", "1")]
    images = [[screen(3, 5)], [], [screen(4, 3, 1), screen(2, 7, 2)]]
    return [
        make_sample(toy_tokenizer, i, q, a, name=str(n))
        for n, (i, (q, a)) in enumerate(zip(images, texts, strict=True))
    ]


def loss_and_gradients(model, packs, geometry) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Sum of cross-entropy over supervised positions divided by the count over all packs."""
    model.zero_grad(set_to_none=True)
    num_supervised = sum(pack.num_supervised for pack in packs)
    total = torch.zeros(())
    for pack in packs:
        inputs = model_inputs(pack, geometry, torch.float32)
        logits = model(**inputs, logits_to_keep=pack.logit_index).logits[0]
        loss = F.cross_entropy(logits, pack.labels, reduction="sum") / num_supervised
        loss.backward()
        total += loss.detach()
    return total, [p.grad.clone() if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]


@pytest.mark.parametrize("mode", ["eval", "train", "train, checkpointed"])
def test_packed_equals_apart_in_logits_loss_and_gradients(mode, toy_model, uneven_samples, geometry):
    model = copy.deepcopy(toy_model).train(mode != "eval")
    if "checkpointed" in mode:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    together = pack_samples(uneven_samples, geometry)
    apart = [pack_samples([sample], geometry) for sample in uneven_samples]
    with torch.no_grad():
        rows = [logits_of(model, [sample], geometry) for sample in uneven_samples]
        # Other matrix shapes round differently: 2e-7 measured.
        torch.testing.assert_close(logits_of(model, uneven_samples, geometry), torch.cat(rows), atol=1e-5, rtol=1e-5)
    loss_together, gradients_together = loss_and_gradients(model, [together], geometry)
    loss_apart, gradients_apart = loss_and_gradients(model, apart, geometry)
    torch.testing.assert_close(loss_together, loss_apart, atol=1e-6, rtol=1e-6)
    for one, other in zip(gradients_together, gradients_apart, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("mode", ["eval", "train"])
@torch.no_grad()
def test_a_samples_logits_do_not_depend_on_its_neighbours(mode, toy_model, toy_tokenizer, geometry):
    model = copy.deepcopy(toy_model).train(mode == "train")
    other = make_sample(toy_tokenizer, [screen(3, 4, 9)], "Where is Save?", "(1, 2)")
    changed = make_sample(toy_tokenizer, [screen(3, 4, 9) ^ 255], "Where is Save?", "(3, 4)")
    assert len(other) == len(changed)
    mine = make_sample(toy_tokenizer, [screen(3, 5)], "Where is Save?", "(512, 87)")
    before = logits_of(model, [other, mine, other], geometry)
    after = logits_of(model, [changed, mine, changed], geometry)
    cut = slice(len(other), len(other) + len(mine))
    assert torch.equal(before[cut], after[cut])
    assert not torch.equal(before[: len(other)], after[: len(other)])


@torch.no_grad()
def test_a_one_token_sample_between_two_others_leaks_nothing(toy_model, toy_tokenizer, geometry):
    first, last = (make_sample(toy_tokenizer, [screen(3, 5, n)], "Where?", "(5, 8)") for n in (1, 2))
    one = Sample(np.array([65]), np.zeros((3, 1), dtype=np.int64), np.array([False]), [], 1)
    packed = logits_of(toy_model, [first, one, last], geometry)
    apart = torch.cat([logits_of(toy_model, [sample], geometry) for sample in (first, one, last)])
    torch.testing.assert_close(packed, apart, atol=1e-5, rtol=1e-5)


def test_labels_stand_one_behind_their_predicting_positions(uneven_samples, geometry):
    pack = pack_samples(uneven_samples, geometry)
    assert torch.equal(pack.input_ids[pack.logit_index + 1], pack.labels)
    assert pack.num_supervised == sum(s.num_supervised for s in uneven_samples)
    borders = set(pack.cu_seqlens.tolist())
    assert not borders & set((pack.logit_index + 1).tolist()), "no token is predicted from another sample"


@torch.no_grad()
def test_block_index_decodes_the_full_image_from_kept_blocks(toy_model, toy_tokenizer, geometry):
    """Proposition 1 on the device: kept blocks gathered by `source` feed the full model its own pixels."""
    image = screen(4, 6, 3)
    pruned = make_sample(toy_tokenizer, [image], "Where?", "(5, 8)")
    full = make_sample(toy_tokenizer, [image], "Where?", "(5, 8)", "none")
    selection = pruned.images[0].selection
    rank_of_kept = np.cumsum(selection.keep.reshape(-1)) - 1
    full_pack = pack_samples([full], geometry)
    index = torch.from_numpy(rank_of_kept[selection.source.reshape(-1)])
    decoded = pack_samples([pruned], geometry).blocks[index]
    assert torch.equal(decoded, full_pack.blocks)
