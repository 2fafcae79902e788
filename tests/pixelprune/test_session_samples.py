"""Conversations whose images are pruned together: samples, rows, generation, against definitions and stock parts."""

from __future__ import annotations

import dataclasses
import logging

import numpy as np
import pytest
import torch

from pixelprune.conversation import Conversation
from pixelprune.hf import generate, prepare
from pixelprune.pack import decoding_index, pack_samples
from pixelprune.records.prepare import Preparer, PrepareSettings
from pixelprune.records.record import RecordError
from pixelprune.sessions import select_session
from pixelprune.settings import PruneSettings
from tests.pixelprune.generation_reference import NUM_NEW, SMALL, decode_uncached, logits_from_the_start, logits_of
from tests.pixelprune.test_pack import logits_of as row_logits
from tests.pixelprune.test_pack import loss_and_gradients
from tests.samples import draw_walk, walk_row

WAYS = {
    "backward": PruneSettings("pred3d", direction="backward"),
    "forward": PruneSettings("pred3d", direction="forward"),
    "forward, what changed": PruneSettings("pred3d", direction="forward", keep_replaced=False),
}


def arrays(pictures: list) -> list[np.ndarray]:
    return [np.asarray(picture) for picture in pictures]


def selected(images: list[np.ndarray], prune: PruneSettings, borders: tuple[int, ...] = ()):
    replaced = prune.keep_replaced and prune.direction == "forward"
    given = {"metric": prune.metric, "threshold": prune.threshold, "borders": borders}
    return select_session(images, direction=prune.direction, keep_replaced=replaced, **given)


def kept_blocks(image: np.ndarray, keep: np.ndarray) -> np.ndarray:
    return np.stack([image[32 * r : 32 * r + 32, 32 * c : 32 * c + 32] for r, c in np.argwhere(keep)])


@pytest.mark.parametrize("prune", [*WAYS.values(), dataclasses.replace(WAYS["forward"], threshold=0.1)])
def test_a_sample_is_the_full_one_without_what_its_session_omits(prune, preparer):
    pictures = [*draw_walk(4, 1), *draw_walk(2, 2, rows=3)]
    parts = [{"image": pictures[0]}, *({"image": picture} for picture in pictures[1:])]
    parts[2]["new_session"] = True
    row = walk_row(parts)
    expected = selected(arrays(pictures), prune, borders=(2,))
    sample = dataclasses.replace(preparer, prune=prune).prepare(row, None).sample
    full = dataclasses.replace(preparer, prune=PruneSettings("none")).prepare(row, None).sample
    columns = np.ones(len(full), dtype=bool)
    columns[full.input_ids == preparer.image_token_id] = np.concatenate([one.keep.ravel() for one in expected])
    assert not columns.all()
    for name in ("input_ids", "supervised"):
        assert np.array_equal(getattr(sample, name), getattr(full, name)[columns])
    assert np.array_equal(sample.position_ids, full.position_ids[:, columns]), "MRoPE of the unpruned sequence"
    assert sample.next_position == full.next_position
    for number, (image, one, picture) in enumerate(zip(sample.images, expected, pictures, strict=True)):
        assert np.array_equal(image.blocks, kept_blocks(np.asarray(picture), one.keep))
        assert np.array_equal(image.selection.source, one.origin[..., 1])
        numbers = np.full(one.keep.shape, number) if image.selection.image is None else image.selection.image
        assert np.array_equal(numbers, one.origin[..., 0])


@pytest.mark.parametrize("strategy", ["random", "conncomp", "conncomp_cover", "resize"])
def test_baselines_are_given_what_the_session_keeps_of_each_image(strategy, preparer):
    pictures = draw_walk(4, 1)
    prune = PruneSettings(strategy, budget="pred3d", direction="backward")
    images = dataclasses.replace(preparer, prune=prune).prepare(walk_row(pictures), None).sample.images
    budgets = [one.num_kept for one in selected(arrays(pictures), WAYS["backward"])]
    kept = [image.selection.num_kept for image in images]
    if strategy == "resize":
        assert all(num <= budget for num, budget in zip(kept, budgets, strict=True))
        assert {image.num_full_blocks for image in images} == {20}
    else:
        assert kept == budgets


def test_auto_is_backward_where_the_last_turn_alone_is_trained_on(model_folder):
    row, images = walk_row(draw_walk(3), every_turn=True), arrays(draw_walk(3))
    for last_turn_only, way in ((True, "backward"), (False, "forward")):
        settings = PrepareSettings(str(model_folder), PruneSettings("pred3d"), SMALL, last_turn_only)
        record = settings.build().prepare(row, None)
        keeps = [image.selection.keep for image in record.sample.images]
        assert all(np.array_equal(keep, one.keep) for keep, one in zip(keeps, selected(images, WAYS[way]), strict=True))
        explicit = dataclasses.replace(settings, prune=WAYS[way])
        assert explicit.fingerprint(explicit.build()) == settings.fingerprint(settings.build())


def test_backward_with_an_earlier_turn_trained_on_is_refused(preparer):
    backward = dataclasses.replace(preparer, prune=WAYS["backward"])
    with pytest.raises(RecordError, match=r"data.last_turn_only=true, or prune.direction=forward") as refused:
        backward.prepare(walk_row(draw_walk(2), every_turn=True), None)
    assert refused.value.reason == "prune_direction"
    assert backward.prepare(walk_row(draw_walk(1), every_turn=True), None).num_images == 1


def test_a_border_is_part_of_what_the_record_is(preparer):
    def hashed(**more) -> int:
        return preparer.prepare(walk_row([{"image": picture, **more} for picture in draw_walk(2)]), None).content_hash

    assert hashed() == hashed(new_session=False) != hashed(new_session=True)
    with pytest.raises(RecordError, match="new_session is 'yes', expected true or false"):
        hashed(new_session="yes")


def made(preparer: Preparer, prune: PruneSettings, *walks, **more) -> list:
    preparer = dataclasses.replace(preparer, prune=prune, with_full=more.pop("with_full", False))
    records = [preparer.prepare(walk_row(walk, f"Question {n}?"), None) for n, walk in enumerate(walks)]
    return [(record.sample, record.full) for record in records]


@pytest.mark.parametrize("way", ["backward", "forward"])
def test_packed_equals_apart_in_logits_loss_and_gradients(way, toy_model, geometry, preparer):
    samples = [sample for sample, _ in made(preparer, WAYS[way], draw_walk(3, 1), draw_walk(1, 2), draw_walk(2, 3))]
    with torch.no_grad():
        apart = torch.cat([row_logits(toy_model, [sample], geometry) for sample in samples])
        # Other matrix shapes round differently, as without sessions.
        torch.testing.assert_close(row_logits(toy_model, samples, geometry), apart, atol=1e-5, rtol=1e-5)
    together = loss_and_gradients(toy_model, [pack_samples(samples, geometry)], geometry)
    one_by_one = loss_and_gradients(toy_model, [pack_samples([sample], geometry) for sample in samples], geometry)
    torch.testing.assert_close(together[0], one_by_one[0], atol=1e-6, rtol=1e-6)
    for one, other in zip(together[1], one_by_one[1], strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    toy_model.zero_grad(set_to_none=True)


@pytest.mark.parametrize("way", WAYS)
def test_the_teachers_pixels_are_decoded_across_images(way, geometry, preparer):
    walks = [draw_walk(4, 1), [*draw_walk(2, 2), *draw_walk(2, 3, rows=2)], draw_walk(1, 4)]
    pairs = made(preparer, WAYS[way], *walks, with_full=True)
    samples = [sample for sample, _ in pairs]
    assert any(image.selection.image is not None for sample in samples for image in sample.images)
    assert all(len(image.blocks) == 0 for _, full in pairs for image in full.images), "no pixel travels twice"
    originals = [kept_blocks(pixels, np.ones((pixels.shape[0] // 32, pixels.shape[1] // 32)))
                 for walk in walks for pixels in arrays(walk)]  # fmt: skip
    decoded = pack_samples(samples, geometry).blocks[decoding_index(samples)]
    assert torch.equal(decoded, torch.from_numpy(np.concatenate(originals)))


@pytest.mark.parametrize("way", WAYS)
def test_generate_equals_uncached_decoding(way, lively, toy_tokenizer, prompter):
    images = arrays(draw_walk(3, 5))
    messages = [
        {"role": "user", "content": [{"type": "image", "image": images[0]}, {"type": "text", "text": "Open it."}]},
        {"role": "assistant", "content": "click(0)"},
        {"role": "user", "content": [*({"type": "image", "image": image} for image in images[1:]),
                                     {"type": "text", "text": "What changed?"}]},
    ]  # fmt: skip
    inputs = prepare(dataclasses.replace(prompter, prune=WAYS[way]), messages)
    keeps = [one.keep for one in selected(images, WAYS[way])]
    assert inputs.num_kept_blocks == sum(int(keep.sum()) for keep in keeps)
    answer = generate(lively, inputs, max_new_tokens=NUM_NEW, output_logits=True)
    tokens, logits = decode_uncached(lively, toy_tokenizer, messages, keeps, NUM_NEW)
    assert answer.token_ids == [tokens]
    # A cache gives other matrix shapes, which round differently; logits are up to 6 in size.
    torch.testing.assert_close(logits_of(answer), logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("direction", ["auto", "backward"])
def test_a_conversations_turns_equal_a_fresh_pass_with_the_same_selections(
    direction, lively, toy_tokenizer, prompter, caplog
):
    images = arrays(draw_walk(4, 6))
    turns = [[0], [1, 2], [], [3]]
    prune = PruneSettings("pred3d", direction=direction)
    conversation = Conversation(lively, dataclasses.replace(prompter, prune=prune))
    caplog.set_level(logging.INFO, "pixelprune.conversation")
    ids: list[int] = []
    said = ""
    for number, added in enumerate(turns):
        content = [*({"type": "image", "image": images[i]} for i in added), {"type": "text", "text": f"Step {number}"}]
        num_cached = conversation.num_cached_tokens
        caplog.clear()
        answer = conversation.ask(content, max_new_tokens=4, output_logits=True)
        closing = "<|im_end|>\n" if number else ""
        shown = "<|vision_start|><|image_pad|><|vision_end|>" * len(added) + f"Step {number}"
        text = f"{closing}<|im_start|>user\n{shown}<|im_end|>\n<|im_start|>assistant\n"
        # A turn without a new image changes nothing of the earlier ones, whatever the direction.
        starts_anew = direction == "backward" and bool(added) and num_cached > 0
        assert ("computed from the start" in caplog.text) == starts_anew
        said += text
        # From the start, earlier answers are read as text: other tokens than those that were generated, possibly.
        ids = toy_tokenizer(said)["input_ids"] if starts_anew else ids + toy_tokenizer(text)["input_ids"]
        ids += answer.token_ids[0]
        said += answer.text
        num_images = max((i for turn in turns[: number + 1] for i in turn), default=-1) + 1
        resolved = prune.resolved(last_turn_only=False)
        keeps = [one.keep for one in selected(images[:num_images], resolved)]
        expected = logits_from_the_start(lively, toy_tokenizer, ids, images[:num_images], keeps)
        assert len(expected) == conversation.num_tokens
        torch.testing.assert_close(logits_of(answer), expected[-5:-1], atol=1e-4, rtol=1e-4)
