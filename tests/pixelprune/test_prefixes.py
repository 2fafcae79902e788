"""Shared prefixes: what may be shared, and rows that share equal rows apart in logits, loss and gradients."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer

from pixelprune.attention.prefixes import Group, find_groups, groups_of_full, pieces_of, row_borders
from pixelprune.attention.segments import KERNELS, use_borders
from pixelprune.model_call import final_hidden
from pixelprune.pack import VisionGeometry, pack_samples
from pixelprune.sample import Sample
from tests.conftest import screen
from tests.pixelprune.reference import make_sample
from tests.pixelprune.test_borders import assert_equal_gradients

QUESTIONS = [
    ("Where is Save?", "(5, 8)"),
    ("Where is the menu, and what is in it?", "At the top: File, Edit, View and Help."),
    ("Open", "(1, 2)"),
    ("Why?", "Because."),
    ("Where is Save?", "(5, 8)"),  # the same question twice
    ("What is the title?", "Untitled"),
    ("Click", "(0, 0)"),
    ("Is anything selected here at all?", "No."),
    ("x", "y"),
]


def group_of(tokenizer, picture: int, count: int) -> list[Sample]:
    return [make_sample(tokenizer, [screen(4, 5, picture)], *texts, name=f"{picture}:{texts[0]}")
            for texts in QUESTIONS[:count]]  # fmt: skip


def one_token_suffixes(tokenizer) -> list[Sample]:
    """Nothing but one token behind the prefix, which predicts nothing: what is left is one query over all keys."""
    whole = make_sample(tokenizer, [screen(4, 5)], *QUESTIONS[0])
    first = int(np.flatnonzero(whole.supervised)[0])
    ends = []
    for token in (70, 71):
        ids = np.append(whole.input_ids[:first], token)
        positions = np.append(whole.position_ids[:, :first], whole.position_ids[:, first - 1 : first] + 1, axis=1)
        ends.append(Sample(ids, positions, np.zeros(first + 1, dtype=bool), whole.images, 0))
    return [whole, *ends]


def cases(tokenizer) -> dict[str, tuple[list[Sample], int]]:
    """Samples of a row, and how many groups of several they make."""
    one, other = group_of(tokenizer, 0, 9), group_of(tokenizer, 1, 4)
    text = make_sample(tokenizer, [], "Why?", "Because.")
    twice = [make_sample(tokenizer, [screen(4, 5), screen(3, 3, 7)], *texts) for texts in QUESTIONS[:3]]
    behind = [make_sample(tokenizer, [screen(4, 5), screen(3, 3, number)], *QUESTIONS[0]) for number in (7, 8)]
    long = "You find elements on screens and answer with their place, nothing else, in one line. " * 3
    prompts = [make_sample(tokenizer, [], long + texts[0], texts[1]) for texts in QUESTIONS[:4]]
    return {
        "one": (one[:1], 0),
        "two": (one[:2], 1),
        "nine": (one, 1),
        "several groups, interleaved, and one alone": ([one[0], other[0], text, *one[1:4], *other[1:], one[4]], 2),
        "two images in the prefix": (twice, 1),
        "an image behind the prefix": (behind, 1),
        "a shared text": (prompts, 1),
        "one-token suffixes": (one_token_suffixes(tokenizer), 1),
    }


CASES = (
    "one",
    "two",
    "nine",
    "several groups, interleaved, and one alone",
    "two images in the prefix",
    "an image behind the prefix",
    "a shared text",
    "one-token suffixes",
)


def tail_logits(model, samples: list[Sample], groups, geometry) -> list[torch.Tensor]:
    """Logits of each sample's last piece, in the order of the samples."""
    logits = model.lm_head(final_hidden(model, pack_samples(samples, geometry, groups), geometry))
    pieces = pieces_of(samples, groups)
    ranges = [segment.queries for segment in row_borders(pieces).segments]
    last = {piece.sample: slice(*own) for piece, own in zip(pieces, ranges, strict=True)}
    return [logits[last[number]] for number in range(len(samples))]


def loss_and_gradients(model, samples: list[Sample], geometry, groups=None):
    """Sum of the cross-entropies, and gradients of it; one forward where groups are given, else one per sample."""
    model.zero_grad(set_to_none=True)
    packs = [pack_samples(samples, geometry, groups)] if groups else [pack_samples([s], geometry) for s in samples]
    total, order = 0.0, []
    for pack in packs:
        logits = model.lm_head(final_hidden(model, pack, geometry)[pack.logit_index])
        loss = torch.nn.functional.cross_entropy(logits, pack.labels, reduction="sum")
        loss.backward()
        total += loss.item()
        order.append(pack.labels)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return total, gradients, torch.cat(order)


@pytest.fixture(scope="module", params=["qwen3_vl", "qwen3_vl_moe"])
def served(request, tmp_path_factory):
    """(model, tokenizer, geometry) of a family whose layers but attention work on single tokens."""
    from training.composition.toy import build_toy_model

    folder = build_toy_model(tmp_path_factory.mktemp(request.param) / "model", family=request.param)
    model = AutoModelForImageTextToText.from_pretrained(folder).train()
    use_borders(model)
    return model, AutoTokenizer.from_pretrained(folder), VisionGeometry.from_config(model.config)


@pytest.mark.parametrize("case", CASES)
def test_a_shared_row_equals_rows_apart(served, case):
    model, tokenizer, geometry = served
    samples, num_groups = cases(tokenizer)[case]
    groups = find_groups(samples, geometry.image_token_id)
    assert sum(len(group.members) > 1 for group in groups) == num_groups
    pack = pack_samples(samples, geometry, groups)
    assert (pack.num_tokens < sum(map(len, samples))) == bool(num_groups)
    with torch.no_grad():
        for number, tail in enumerate(tail_logits(model, samples, groups, geometry)):
            alone = model.lm_head(final_hidden(model, pack_samples(samples[number : number + 1], geometry), geometry))
            torch.testing.assert_close(tail, alone[len(alone) - len(tail) :], atol=1e-5, rtol=1e-5)
    loss, gradients, labels = loss_and_gradients(model, samples, geometry, groups)
    expected_loss, expected, expected_labels = loss_and_gradients(model, samples, geometry)
    assert torch.equal(labels, expected_labels), "what is supervised stays in the samples' order"
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert_equal_gradients(gradients, expected)


@pytest.mark.parametrize("kernel", KERNELS)
@torch.no_grad()
def test_a_change_in_one_suffix_leaves_its_siblings_bit_identical(toy_folder, toy_tokenizer, geometry, kernel):
    model = AutoModelForImageTextToText.from_pretrained(toy_folder, attn_implementation=kernel).eval()
    use_borders(model, kernel)
    samples = group_of(toy_tokenizer, 0, 4)
    groups = find_groups(samples, geometry.image_token_id)
    before = tail_logits(model, samples, groups, geometry)
    changed = dataclasses.replace(samples[1], input_ids=samples[1].input_ids.copy())
    changed.input_ids[-3] += 1
    after = tail_logits(model, [samples[0], changed, *samples[2:]], groups, geometry)
    assert not torch.equal(before[1], after[1])
    for number in (0, 2, 3):
        assert torch.equal(before[number], after[number])


def test_recomputation_gives_the_same_bits(toy_model, toy_tokenizer, geometry):
    model = copy.deepcopy(toy_model).train()
    use_borders(model)
    samples = group_of(toy_tokenizer, 0, 4)
    groups = find_groups(samples, geometry.image_token_id)
    loss, expected, _ = loss_and_gradients(model, samples, geometry, groups)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    again, gradients, _ = loss_and_gradients(model, samples, geometry, groups)
    assert again == loss
    for name, gradient in gradients.items():
        assert torch.equal(gradient, expected[name]), name


def test_bfloat16_is_no_further_from_float32_than_rows_apart(toy_model, toy_tokenizer, geometry):
    samples = group_of(toy_tokenizer, 0, 9)
    groups = find_groups(samples, geometry.image_token_id)
    exact = copy.deepcopy(toy_model).train()
    use_borders(exact)
    half = copy.deepcopy(exact).to(torch.bfloat16)
    _, expected, _ = loss_and_gradients(exact, samples, geometry)

    def distance(gradients) -> float:
        squares = [(gradients[name].float() - expected[name]).square().sum() for name in expected]
        return float(torch.stack(squares).sum().sqrt())

    # Each row's gradient in float32, as training accumulates them; one call per row would add them up in bfloat16.
    apart = [loss_and_gradients(half, [sample], geometry)[1] for sample in samples]
    summed = {name: sum(gradients[name].float() for gradients in apart) for name in expected}
    assert distance(loss_and_gradients(half, samples, geometry, groups)[1]) < 1.2 * distance(summed)


def test_prefixes_end_before_another_image_and_before_what_is_supervised(toy_tokenizer, geometry):
    token = geometry.image_token_id
    one = make_sample(toy_tokenizer, [screen(4, 5)], *QUESTIONS[0])
    moved = make_sample(toy_tokenizer, [np.ascontiguousarray(screen(4, 5)[::-1])], *QUESTIONS[0])
    kept = one.images[0].selection.num_kept
    # As many kept blocks and equal ids, but other pixels: nothing beyond the tokens before the image is common.
    fake = dataclasses.replace(one, images=[dataclasses.replace(one.images[0], blocks=one.images[0].blocks ^ 1)])
    assert np.array_equal(one.input_ids, fake.input_ids)
    assert find_groups([one, fake], token) == (Group((0,)), Group((1,)))
    assert find_groups([one, moved], token) == (Group((0,)), Group((1,)))
    first = int(np.flatnonzero(one.supervised)[0])
    again = make_sample(toy_tokenizer, [screen(4, 5)], *QUESTIONS[0])
    assert find_groups([one, again], token) == (Group((0, 1), first - 1, 1),)
    # A second image that differs: the prefix ends at its first token, however alike the ids.
    pair = [make_sample(toy_tokenizer, [screen(4, 5), screen(3, 3, number)], *QUESTIONS[0]) for number in (7, 8)]
    (group,) = find_groups(pair, token)
    runs = np.flatnonzero(np.diff((pair[0].input_ids == token).astype(int)) == 1) + 1
    assert group == Group((0, 1), runs[1], 1)
    assert len(pack_samples(pair, geometry, [group]).vit_cu_seqlens) == 3 + 1
    assert kept == len(pack_samples([one, again], geometry, find_groups([one, again], token)).blocks)


def test_what_saves_little_is_not_shared(toy_tokenizer, geometry):
    """Different pictures behind the template's first tokens: gathering keys for each would cost more than it saves."""
    samples = [make_sample(toy_tokenizer, [screen(6, 8, number)], *QUESTIONS[1]) for number in (1, 2, 3)]
    assert all(len(group.members) == 1 for group in find_groups(samples, geometry.image_token_id))


def test_counts_say_what_is_computed_and_what_each_record_has(toy_tokenizer, geometry):
    samples = group_of(toy_tokenizer, 0, 4)
    (group,) = find_groups(samples, geometry.image_token_id)
    shared, apart = pack_samples(samples, geometry, [group]), pack_samples(samples, geometry)
    assert shared.num_tokens == group.prefix_len + sum(len(sample) - group.prefix_len for sample in samples)
    assert shared.num_shared_tokens == apart.num_tokens - shared.num_tokens == 3 * group.prefix_len
    assert 4 * shared.num_patches == apart.num_patches
    per_record = ("sample_lens", "num_kept_blocks", "num_full_blocks", "num_full_tokens", "num_supervised",
                  "num_supervised_per_sample", "num_images_per_sample", "record_ids", "loss_weight")  # fmt: skip
    for name in per_record:
        assert getattr(shared, name) == getattr(apart, name), name
    ((num_samples, kept_blocks, num_text_tokens),) = shared.shared
    assert (num_samples, kept_blocks) == (4, (samples[0].images[0].selection.num_kept,))
    assert num_text_tokens + sum(kept_blocks) == group.prefix_len
    assert (apart.shared, apart.num_shared_tokens) == ((), 0)


def test_full_rows_share_the_same_prefix_unless_their_pictures_differ(toy_tokenizer, geometry):
    samples = group_of(toy_tokenizer, 0, 3)
    full = [make_sample(toy_tokenizer, [screen(4, 5)], *texts, strategy="none") for texts in QUESTIONS[:3]]
    (group,) = find_groups(samples, geometry.image_token_id)
    omitted = 4 * 5 - samples[0].images[0].selection.num_kept
    assert omitted > 0
    (wide,) = groups_of_full([group], samples, full)
    assert wide == group._replace(prefix_len=group.prefix_len + omitted)
    assert (full[0].input_ids[: wide.prefix_len] == full[1].input_ids[: wide.prefix_len]).all()
    other = dataclasses.replace(full[2].images[0], blocks=full[2].images[0].blocks ^ 1)
    full[2] = dataclasses.replace(full[2], images=[other])
    assert groups_of_full([group], samples, full) == (Group((0,)), Group((1,)), Group((2,)))


@pytest.mark.parametrize("groups", [[Group((0,))], [Group((0, 1), 10_000)], [Group((0, 1), 3), Group((1,))]])
def test_groups_that_are_no_row_are_refused(groups, toy_tokenizer):
    with pytest.raises(ValueError, match="groups: "):
        pieces_of(group_of(toy_tokenizer, 0, 2), groups)
