"""Pictures that are encoded once: rows apart in logits, loss and gradients, in every family, whatever is trained."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer

from pixelprune.attention.prefixes import find_groups
from pixelprune.attention.segments import use_borders
from pixelprune.family import FAMILIES
from pixelprune.images.distinct import distinct_images
from pixelprune.images.image import prune_pixels
from pixelprune.model_call import final_hidden
from pixelprune.pack import VisionGeometry, model_inputs, pack_samples, row_pictures
from pixelprune.sample import ChatTokens, Sample, build_sample
from pixelprune.settings import PruneSettings
from tests.conftest import screen
from tests.kernels import needs_plain_layers
from tests.pixelprune.reference import make_sample
from tests.pixelprune.test_borders import assert_equal_gradients

INSTRUCTIONS = ("Point.", "Answer in words, in one line.", "")


def instructed(tokenizer, number: int, picture: int) -> Sample:
    """A sample whose instruction stands before the picture, another one for every number: no common prefix."""
    system = [{"role": "system", "content": INSTRUCTIONS[number]}] if INSTRUCTIONS[number] else []
    content = [{"type": "image"}, {"type": "text", "text": "Where is Save?" + " Where?" * number}]
    turns = [*system, {"role": "user", "content": content}]
    head = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    prompt, answer = (tokenizer(text)["input_ids"] for text in (head, f"({number}, 2)<|im_end|>"))
    ids = torch.tensor(prompt + answer).numpy()
    pixels = screen(4, 5, picture)
    image = prune_pixels(pixels, PruneSettings(), pixels.shape[:2])
    token = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    return build_sample(ChatTokens(ids, torch.arange(len(ids)).numpy() >= len(prompt)), [image], image_token_id=token)


def row_of(tokenizer) -> list[Sample]:
    """Two pictures in uneven samples: with instructions before them, behind another picture, twice in one sample."""
    return [
        instructed(tokenizer, 0, 0),
        make_sample(tokenizer, [screen(3, 3, 9), screen(4, 5, 0)], "Compare.", "The second is larger."),
        instructed(tokenizer, 1, 1),
        make_sample(tokenizer, [], "Why?", "Because."),
        instructed(tokenizer, 1, 0),
        make_sample(tokenizer, [screen(4, 5, 1), screen(4, 5, 1)], "Are they equal?", "Yes."),
        instructed(tokenizer, 2, 1),
    ]


PICTURES = (0, 1, 0, 2, 0, 2, 2, 2)


@pytest.fixture(scope="module", params=FAMILIES)
def served(request, tmp_path_factory):
    from training.composition.toy import build_toy_model

    needs_plain_layers(request.param)
    folder = build_toy_model(tmp_path_factory.mktemp(request.param) / "model", family=request.param)
    model = AutoModelForImageTextToText.from_pretrained(folder).train()
    use_borders(model)
    return model, AutoTokenizer.from_pretrained(folder), VisionGeometry.from_config(model.config)


def outcome(model, packs, geometry):
    """Logits of all tokens, the sum of the cross-entropies and its gradients, over packs one by one."""
    model.zero_grad(set_to_none=True)
    logits, total = [], 0.0
    for pack in packs:
        hidden = final_hidden(model, pack, geometry)
        logits.append(model.lm_head(hidden).detach())
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden[pack.logit_index]), pack.labels, reduction="sum")
        loss.backward()
        total += loss.item()
    return torch.cat(logits), total, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def distance(gradients, expected) -> float:
    """Relative, over all tensors together."""
    assert gradients.keys() == expected.keys()
    difference = sum((gradients[name] - expected[name]).square().sum() for name in expected)
    return float((difference / sum(gradient.square().sum() for gradient in expected.values())).sqrt())


def test_a_row_that_encodes_pictures_once_equals_rows_apart(served):
    model, tokenizer, geometry = served
    samples = row_of(tokenizer)
    pictures = row_pictures(samples)
    assert pictures == PICTURES
    once = pack_samples(samples, geometry, pictures=pictures)
    apart = [pack_samples([sample], geometry) for sample in samples]
    assert once.num_tokens == sum(pack.num_tokens for pack in apart), "the language model's row is as it was"
    logits, loss, gradients = outcome(model, [once], geometry)
    expected_logits, expected_loss, expected = outcome(model, apart, geometry)
    torch.testing.assert_close(logits, expected_logits, atol=1e-5, rtol=1e-5)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert distance(gradients, expected) < 1e-5
    # Tensor by tensor against the row that encodes every image: a delta net's decays, whose gradient is 1e-9 of the
    # whole, round otherwise in a batch than alone (5e-5), with or without pictures that are encoded once.
    assert_equal_gradients(gradients, outcome(model, [pack_samples(samples, geometry)], geometry)[2])


@pytest.mark.parametrize("frozen", ["visual.", "language_model."])
def test_with_a_frozen_tower_too(served, frozen):
    model, tokenizer, geometry = served
    model = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(frozen not in name)
    samples = row_of(tokenizer)
    once = pack_samples(samples, geometry, pictures=PICTURES)
    _, loss, gradients = outcome(model, [once], geometry)
    _, expected_loss, expected = outcome(model, [pack_samples(samples, geometry)], geometry)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert_equal_gradients(gradients, expected)
    assert not any(frozen in name for name in gradients)


def test_recomputation_gives_the_same_bits(served):
    model, tokenizer, geometry = served
    once = [pack_samples(row_of(tokenizer), geometry, pictures=PICTURES)]
    expected_logits, _, expected = outcome(model, once, geometry)
    model = copy.deepcopy(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    logits, _, gradients = outcome(model, once, geometry)
    assert torch.equal(logits, expected_logits)
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)


def test_a_prefix_stands_once_and_its_picture_elsewhere_is_not_encoded_again(toy_model, toy_tokenizer, geometry):
    model = copy.deepcopy(toy_model).train()
    use_borders(model)
    asked = [make_sample(toy_tokenizer, [screen(4, 5, 0)], f"Where is {what}?", "Here.") for what in ("Save", "it")]
    samples = [asked[0], instructed(toy_tokenizer, 1, 0), asked[1], instructed(toy_tokenizer, 0, 0)]
    groups = find_groups(samples, geometry.image_token_id)
    assert sorted(len(group.members) for group in groups) == [1, 1, 2]
    pictures = row_pictures(samples, groups)
    assert pictures == (0, 0, 0)
    both = pack_samples(samples, geometry, groups, pictures=pictures)
    assert both.num_patches == 4 * samples[0].images[0].selection.num_kept
    _, loss, gradients = outcome(model, [both], geometry)
    _, expected_loss, expected = outcome(model, [pack_samples([sample], geometry) for sample in samples], geometry)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert_equal_gradients(gradients, expected)


def test_what_is_not_the_same_picture_is_encoded_for_itself(toy_tokenizer, geometry):
    one, other = (make_sample(toy_tokenizer, [screen(4, 5, number)], "Where?", "Here.") for number in (0, 1))
    image = one.images[0]
    pixels = dataclasses.replace(image, blocks=image.blocks ^ 1)
    moved = dataclasses.replace(image, selection=dataclasses.replace(image.selection, keep=image.selection.keep[::-1]))
    images = [image, other.images[0], pixels, moved, image]
    assert distinct_images([(images, number) for number in range(5)]) == (0, 1, 2, 3, 0)
    apart = pack_samples([one, other], geometry, pictures=(0, 1))
    assert apart.image_order == (0, 1), "the same way through the model, whatever a pack holds"
    assert torch.equal(apart.blocks, pack_samples([one, other], geometry).blocks)


def test_counts_say_what_is_encoded_and_what_each_record_has(toy_tokenizer, geometry):
    samples = row_of(toy_tokenizer)
    once, apart = (pack_samples(samples, geometry, pictures=pictures) for pictures in (PICTURES, None))
    kept = [image.selection.num_kept for sample in samples for image in sample.images]
    assert apart.repeated_images == ()
    assert once.repeated_images == tuple(kept[place] for place in (2, 4, 5, 6, 7))
    assert once.num_patches == apart.num_patches - 4 * sum(once.repeated_images)
    for name in ("num_tokens", "num_kept_blocks", "num_full_blocks", "num_full_tokens", "num_images_per_sample"):
        assert getattr(once, name) == getattr(apart, name), name


def test_the_plain_inputs_of_such_a_row_are_refused(toy_tokenizer, geometry):
    once = pack_samples(row_of(toy_tokenizer), geometry, pictures=PICTURES)
    with pytest.raises(ValueError, match=r"pictures are encoded once: expected a call through .*final_hidden"):
        model_inputs(once, geometry, torch.float32)
