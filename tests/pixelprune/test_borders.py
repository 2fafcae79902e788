"""Attention per segment: the stock masked row in every family, without its mask; shared prefixes; what is refused."""

from __future__ import annotations

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer, masking_utils
from transformers.integrations import sdpa_attention

from pixelprune.attention import segments as attention
from pixelprune.attention.borders import Borders, Segment
from pixelprune.attention.segments import segment_attention, takes_borders, use_borders
from pixelprune.family import FAMILIES
from pixelprune.model_call import final_hidden
from pixelprune.pack import Pack, VisionGeometry, model_inputs, pack_samples
from pixelprune.sample import Sample
from tests.conftest import screen
from tests.kernels import needs_plain_layers
from tests.pixelprune.reference import make_sample


def uneven_samples(tokenizer) -> list[Sample]:
    """Several images of different size, none, and a sample of one token."""
    one = Sample(np.array([65]), np.zeros((3, 1), dtype=np.int64), np.array([False]), [], 1)
    return [
        make_sample(tokenizer, [screen(3, 5), screen(2, 7, 1)], "Where is Save?", "(512, 87)"),
        one,
        make_sample(tokenizer, [], "Why?", "Because."),
        make_sample(tokenizer, [screen(6, 4, 2)], "And now?", "Open the menu."),
    ]


def hidden_and_gradients(model, pack: Pack, geometry) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Every entry of the logits counts, each differently."""
    model.zero_grad(set_to_none=True)
    logits = model.lm_head(final_hidden(model, pack, geometry))
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_equal_gradients(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """1e-5 over all tensors together, and in each that is above 1e-6 of the whole: float32 sums in another order."""
    assert actual.keys() == expected.keys()
    squares = {name: ((actual[name] - expected[name]).square().sum(), expected[name].square().sum()) for name in actual}
    whole = sum(square for _, square in squares.values())
    assert sum(difference for difference, _ in squares.values()) < 1e-10 * whole
    for name, (difference, square) in squares.items():
        if square > 1e-12 * whole:
            assert difference < 1e-10 * square, f"{name}: {(difference / square).sqrt():.1e}"


@pytest.mark.parametrize("kernel", attention.KERNELS)
@pytest.mark.parametrize("family", FAMILIES)
def test_segments_equal_the_masked_row(family, kernel, tmp_path):
    needs_plain_layers(family)
    from training.composition.toy import build_toy_model

    folder = build_toy_model(tmp_path / family, family=family)
    stock = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation=kernel).train()
    model = copy.deepcopy(stock)
    use_borders(model, kernel)
    geometry = VisionGeometry.from_config(stock.config)
    pack = pack_samples(uneven_samples(AutoTokenizer.from_pretrained(folder)), geometry)
    logits, gradients = hidden_and_gradients(model, pack, geometry)
    expected_logits, expected = hidden_and_gradients(stock, pack, geometry)
    torch.testing.assert_close(logits, expected_logits, atol=1e-5, rtol=1e-5)
    assert_equal_gradients(gradients, expected)


@pytest.fixture
def model(toy_model):
    model = copy.deepcopy(toy_model).train()
    use_borders(model)
    return model


@torch.no_grad()
def test_no_mask_anywhere_and_one_call_per_segment(model, toy_tokenizer, geometry, monkeypatch):
    calls = []

    def recorded(module, query, key, value, attention_mask, **kwargs):
        calls.append((query.shape[2], key.shape[2], attention_mask))
        return sdpa_attention.sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    monkeypatch.setattr(attention, "sdpa_attention_forward", recorded)
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda *_: pytest.fail("looks for borders"))
    monkeypatch.setattr(attention, "_read_borders", lambda *_: pytest.fail("waits for the device"))
    pack = pack_samples(uneven_samples(toy_tokenizer), geometry)
    final_hidden(model, pack, geometry)
    depth, layers = len(model.model.visual.blocks), len(model.model.language_model.layers)
    images = pack.vit_cu_seqlens.diff().tolist()
    assert calls == [(n, n, None) for n in images] * depth + [(n, n, None) for n in pack.sample_lens] * layers


@torch.no_grad()
def test_a_sample_alone_is_the_stock_call_bit_for_bit(model, toy_model, toy_tokenizer, geometry):
    pack = pack_samples(uneven_samples(toy_tokenizer)[:1], geometry)
    assert torch.equal(final_hidden(model, pack, geometry), final_hidden(toy_model, pack, geometry))


def test_recomputation_sees_its_own_rows_borders(model, toy_tokenizer, geometry):
    """Another row, as a teacher runs it, comes between forward and backward: state in a module would be overtaken."""
    samples = uneven_samples(toy_tokenizer)
    pack, other = pack_samples(samples, geometry), pack_samples(samples[::-1], geometry)
    _, expected = hidden_and_gradients(model, pack, geometry)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.zero_grad(set_to_none=True)
    logits = model.lm_head(final_hidden(model, pack, geometry))
    with torch.no_grad():
        final_hidden(model, other, geometry)
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, expected[name]), name


@pytest.mark.parametrize("kernel", attention.KERNELS)
@torch.no_grad()
def test_generation_with_left_padding_is_the_stock_one(kernel, toy_folder, toy_tokenizer):
    stock = AutoModelForImageTextToText.from_pretrained(toy_folder, attn_implementation=kernel).eval()
    model = copy.deepcopy(stock)
    use_borders(model, kernel)
    batch = toy_tokenizer(["Where is Save?", "Open"], return_tensors="pt", padding=True, padding_side="left")
    batch.pop("token_type_ids", None)
    settings = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    expected, answer = stock.generate(**batch, **settings), model.generate(**batch, **settings)
    assert torch.equal(answer.sequences, expected.sequences)
    assert torch.equal(torch.stack(answer.logits), torch.stack(expected.logits))


SHARED = [Segment((0, 4), ((0, 4),)), Segment((4, 6), ((0, 4), (4, 6))), Segment((6, 9), ((0, 4), (6, 9)))]


@pytest.mark.parametrize("kernel", attention.KERNELS)
@pytest.mark.parametrize("is_causal", [True, False])
def test_any_segments_by_the_definition(is_causal, kernel, toy_model):
    """Written out for one query at a time, in float64: ranges of keys behind each other, causal at the lower right."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, 9, 4, generator=generator) for heads in (4, 2, 2))
    layer = toy_model.model.language_model.layers[0].self_attn
    module = copy.deepcopy(layer)
    module.num_key_value_groups = 2
    borders = Borders(SHARED, is_causal=is_causal)
    named = {"row_borders" if is_causal else "borders": borders}
    actual, _ = segment_attention(
        module, query, key, value, None, kernel=kernel, scaling=0.3, is_causal=is_causal, **named
    )
    for (start, stop), ranges in SHARED:
        keys = [k for first, last in ranges for k in range(first, last)]
        for t in range(start, stop):
            seen = keys[: len(keys) - (stop - 1 - t)] if is_causal else keys
            for head in range(4):
                scores = [
                    math.exp(0.3 * float(query[0, head, t].double() @ key[0, head // 2, s].double())) for s in seen
                ]
                terms = (w * value[0, head // 2, s].double() for w, s in zip(scores, seen, strict=True))
                expected = sum(terms, torch.zeros(4).double()) / sum(scores)
                torch.testing.assert_close(actual[0, t, head].double(), expected, atol=1e-6, rtol=1e-6)


def shared_row(samples: list[Sample], prefix: int, geometry) -> Pack:
    """The samples' common prefix once, then what each has behind it, at the positions it has alone."""
    first = pack_samples(samples[:1], geometry)
    tails = [pack_samples([sample], geometry) for sample in samples]
    ids = torch.cat([first.input_ids[:prefix], *(tail.input_ids[prefix:] for tail in tails)])
    positions = torch.cat([first.position_ids[:, :prefix], *(tail.position_ids[:, prefix:] for tail in tails)], dim=1)
    own = Borders.of_lengths([prefix, *(len(sample) - prefix for sample in samples)], is_causal=True).segments
    segments = [own[0], *(Segment(queries, ((0, prefix), queries)) for queries, _ in own[1:])]
    borders = Borders(segments, is_causal=True)
    return dataclasses.replace(first, input_ids=ids, position_ids=positions, borders=borders)


def test_a_shared_prefix_is_only_data(model, toy_model, toy_tokenizer, geometry):
    picture = screen(4, 5)
    questions = [("Where is Save?", "(5, 8)"), ("Where?", "Nowhere at all."), ("Where is Save?", "(5, 8)")]
    samples = [make_sample(toy_tokenizer, [picture], *texts) for texts in questions]
    columns = zip(*(sample.input_ids.tolist() for sample in samples), strict=False)
    prefix = next(place for place, ids in enumerate(columns) if len(set(ids)) > 1)
    row = shared_row(samples, prefix, geometry)
    assert row.num_tokens < sum(map(len, samples))
    hidden = final_hidden(model, row, geometry)
    apart = [final_hidden(model, pack_samples([sample], geometry), geometry) for sample in samples]
    tails = torch.cat([one[prefix:] for one in apart])
    torch.testing.assert_close(hidden[:prefix], apart[0][:prefix], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(hidden[prefix:], tails, atol=1e-5, rtol=1e-5)
    weights = torch.linspace(-1, 1, tails.numel()).view_as(tails)
    gradients = []
    for result in (hidden[prefix:], tails):
        model.zero_grad(set_to_none=True)
        (result * weights).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert_equal_gradients(*gradients)
    with pytest.raises(ValueError, match="expected attention that reads borders"):
        final_hidden(toy_model, row, geometry)


@torch.no_grad()
def test_borders_that_are_missing_or_of_another_row_are_refused(model, toy_model, toy_tokenizer, geometry):
    assert takes_borders(model)
    assert not takes_borders(toy_model)
    samples = uneven_samples(toy_tokenizer)
    pack = pack_samples(samples, geometry)
    inputs = model_inputs(pack, geometry, torch.float32, with_borders=True)
    bare = {name: value for name, value in inputs.items() if not name.startswith(("cu_seq", "max_length", "row_"))}
    with pytest.raises(ValueError, match="without its borders"):
        model(**bare)
    with pytest.raises(ValueError, match="borders of a row of"):
        model(**inputs | {"row_borders": pack_samples(samples[1:], geometry).borders})
    with pytest.raises(ValueError, match="of images in the language model"):
        model(**inputs | {"row_borders": Borders.of_lengths(pack.sample_lens, is_causal=False)})
    # A caller without a pack's host integers, as pixelprune.model_inputs serves stock models: read from the device.
    stock_call = model_inputs(pack, geometry, torch.float32)
    assert torch.equal(model(**stock_call).logits, model(**inputs).logits)


@pytest.mark.parametrize(
    "segments",
    [
        [Segment((1, 3), ((1, 3),))],
        [Segment((0, 2), ((0, 2),)), Segment((3, 4), ((3, 4),))],
        [Segment((0, 0), ((0, 0),))],
        [Segment((0, 2), ((0, 3),))],
        [Segment((0, 2), ((0, 2),)), Segment((2, 4), ((2, 4), (0, 2)))],
        [Segment((0, 2), ())],
    ],
)
def test_segments_that_are_no_row_are_refused(segments):
    with pytest.raises(ValueError, match="borders: "):
        Borders(segments, is_causal=True)
