"""The check of a run's attention: right ones pass, each kind of wrong one is named and refused."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from transformers import AttentionInterface

from pixelprune.attention.borders import Borders
from pixelprune.attention.segments import segment_attention
from tests.kernels import needs_plain_layers
from training.composition.toy import build_toy_model
from training.config.settings import ModelSettings
from training.errors import RankError
from training.model.attention import load_pretrained, varlen_attention
from training.model.attention_check import (
    LIMITS,
    Heads,
    attention_by_definition,
    attention_errors,
    check_attention,
    heads_of,
    shared_row,
)
from training.model.loading import prepare_layers

CPU = torch.device("cpu")
REGISTERED = {"sdpa": "flash_segments_sdpa", "varlen": "flash_varlen", "eager": "flash_segments_eager"}


def load(folder, attention="sdpa", dtype=torch.float32):
    return load_pretrained(str(folder), attention=attention, dtype=dtype)


@pytest.mark.parametrize("is_causal", [True, False])
def test_the_definition_written_out_for_one_query_at_a_time(is_causal):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(9, n, 4, generator=generator, dtype=torch.float64) for n in (4, 2, 2))
    borders = Borders.of_lengths((1, 5, 1, 2), is_causal=is_causal)
    actual = attention_by_definition(query, key, value, borders, scaling=0.3)
    sample = [0, 1, 1, 1, 1, 1, 2, 3, 3]
    for t in range(9):
        seen = [s for s in range(9) if sample[s] == sample[t] and (s <= t or not is_causal)]
        for head in range(4):
            weights = [math.exp(0.3 * float(query[t, head] @ key[s, head // 2])) for s in seen]
            mixed = sum(w * value[s, head // 2] for w, s in zip(weights, seen, strict=True)) / sum(weights)
            torch.testing.assert_close(actual[t, head], mixed, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", REGISTERED)
def test_right_attention_passes(attention, dtype, toy_folder):
    model = load(toy_folder, attention, dtype)
    check_attention(model, CPU, shares_prefix=True)
    text, vision = Heads("language model", 16, 8, 128, True), Heads("vision tower", 16, 16, 72, False)
    apart = {heads: Borders.of_lengths((1, 60, 1, 33), is_causal=heads.is_causal) for heads in (text, vision)}
    for heads, borders in (*apart.items(), (text, shared_row(60, (1, 33, 9)))):
        errors = attention_errors(model, heads, borders, CPU, dtype)
        assert max(errors.values()) < LIMITS[dtype], errors
        if dtype == torch.float32:
            assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("family", ["qwen3_vl_moe", "qwen3_5"])
def test_other_families_heads_are_read(family, tmp_path):
    needs_plain_layers(family)
    model = load(build_toy_model(tmp_path / "model", family=family))
    check_attention(model, CPU)
    assert heads_of(model.config)[0].width == model.config.text_config.head_dim


def merges_samples(module, *args, **kwargs):
    """A kernel that reads its borders wrong: the row is one sample."""
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        kwargs[name] = kwargs[name][[0, -1]]
    kwargs |= dict.fromkeys(("max_length_q", "max_length_k"), int(kwargs["cu_seq_lens_q"][-1]))
    return varlen_attention(module, *args, **kwargs)


def looks_ahead(module, *args, **kwargs):
    """One that takes no notice of causality."""
    return varlen_attention(module, *args, **kwargs | {"is_causal": False})


def groups_heads_wrong(module, query, key, value, *args, **kwargs):
    """One that shares key heads in turns (0 1 0 1) and not in a row (0 0 1 1)."""
    turns = [row.repeat(1, query.shape[1] // row.shape[1], 1, 1) for row in (key, value)]
    return varlen_attention(module, query, *turns, *args, **kwargs)


def loses_a_gradient(module, query, key, value, *args, **kwargs):
    return varlen_attention(module, query, key.detach(), value, *args, **kwargs)


def gives_nan(module, query, *args, **kwargs):
    return varlen_attention(module, query * float("nan"), *args, **kwargs)


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (merges_samples, r"\(language model: "),
        (looks_ahead, r"\(language model: "),
        (groups_heads_wrong, r"\(language model: "),
        (loses_a_gradient, r"the gradient of keys differs from the definition by inf"),
        (gives_nan, r"its output differs from the definition by inf"),
    ],
)
def test_a_wrong_attention_is_named_and_refused(broken, said, toy_folder, monkeypatch):
    model = load(toy_folder, "varlen")
    check_attention(model, CPU)
    monkeypatch.setitem(AttentionInterface._global_mapping, REGISTERED["varlen"], broken)
    settings = ModelSettings(recompute_vit=0, recompute_llm=0)
    with pytest.raises(RankError, match=said) as caught:
        prepare_layers(model, settings, CPU)
    assert str(caught.value).startswith("attention flash_varlen computes wrong on cpu (")
    assert "model.attention=sdpa" in str(caught.value)
    settings.check_attention = False
    prepare_layers(model, settings, CPU)


def forgets_the_prefix(module, *args, row_borders=None, **kwargs):
    """A kernel that takes borders of queries for those of keys: a suffix sees itself alone."""
    if row_borders is not None:
        row_borders = Borders.of_lengths(row_borders.lengths, is_causal=True)
        kwargs["cu_seq_lens_k"] = kwargs["cu_seq_lens_q"]
    return varlen_attention(module, *args, row_borders=row_borders, **kwargs)


def test_a_kernel_that_is_wrong_on_shared_prefixes_alone_is_found_where_they_are_asked_for(toy_folder, monkeypatch):
    model = load(toy_folder, "varlen")
    monkeypatch.setitem(AttentionInterface._global_mapping, REGISTERED["varlen"], forgets_the_prefix)
    settings = ModelSettings(recompute_vit=0, recompute_llm=0)
    prepare_layers(model, settings, CPU)
    with pytest.raises(RankError, match=r"language model: .*, a shared prefix\).*set data\.share_prefix=off or model"):
        prepare_layers(model, settings, CPU, shares_prefix=True)


def test_a_wrong_vision_tower_is_found_too(toy_folder, monkeypatch):
    """Its attention alone is causal by mistake."""
    model = load(toy_folder)
    always_causal = partial(segment_attention)

    def broken(module, *args, is_causal=None, borders=None, row_borders=None, **kwargs):
        if is_causal is False:
            row_borders, is_causal = Borders.of_lengths(borders.lengths, is_causal=True), True
        return always_causal(module, *args, is_causal=is_causal, row_borders=row_borders, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, REGISTERED["sdpa"], broken)
    with pytest.raises(RankError, match=r"\(vision tower: "):
        check_attention(model, CPU)
