"""The attention that was chosen, against its definition, on the very device: milliseconds at the start of a run.

    T = tokens of a row, H / H_kv = heads of queries / keys, E = head width

A kernel built for another torch, a driver that is too old, an argument that a new version reads in another way: none of
them need raise an error. What is called here is what the model's layers will call, through the same name, with the
same arguments, forward and backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel

from pixelprune.attention.borders import Borders, Segment
from pixelprune.attention.segments import takes_borders
from training.errors import RankError

LIMITS = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-3}
"""Errors in norm, relative to the definition's. bfloat16 has 8 bits: 3e-3 when right, up to 9e-3 in gradients; a sample
that sees its neighbour is off by more than 0.1. float32 leaves room for TF32."""
_LENGTHS = (1, 9, 1, 14)
_PREFIX, _SUFFIXES = 11, (1, 9, 14)


class Heads(NamedTuple):
    """Attention of one tower."""

    tower: str
    heads: int
    kv_heads: int
    width: int
    is_causal: bool

    def __str__(self) -> str:
        return f"{self.tower}: {self.heads}/{self.kv_heads} heads of {self.width}"


def heads_of(config: Any) -> tuple[Heads, Heads]:
    """Of a Hugging Face config: the language model's, causal, and the vision tower's, not causal."""
    text, vision = config.text_config, config.vision_config
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return (
        Heads("language model", text.num_attention_heads, text.num_key_value_heads, width, True),
        Heads("vision tower", vision.num_heads, vision.num_heads, vision.hidden_size // vision.num_heads, False),
    )


def check_attention(model: PreTrainedModel, device: torch.device, *, shares_prefix: bool = False) -> None:
    """Raises RankError naming the attention, the tower and the error where the model's attention computes wrong.

    Each rank looks at its own device: one broken GPU of many is what this finds, too. shares_prefix: look at a row
    whose samples share a prefix as well; its attention is one that can (`training.model.sharing.check_sharing`).
    """
    for heads in heads_of(model.config):
        _check_row(model, heads, Borders.of_lengths(_LENGTHS, is_causal=heads.is_causal), device, "")
        if shares_prefix and heads.is_causal:
            _check_row(model, heads, shared_row(_PREFIX, _SUFFIXES), device, ", a shared prefix")


def _check_row(model: PreTrainedModel, heads: Heads, borders: Borders, device: torch.device, what: str) -> None:
    errors = attention_errors(model, heads, borders, device, model.dtype)
    worst = max(errors, key=lambda name: errors[name])
    if errors[worst] > LIMITS[model.dtype]:
        way_out = "set data.share_prefix=off or model.attention=sdpa" if what else "set model.attention=sdpa"
        raise RankError(
            f"attention {model.config._attn_implementation} computes wrong on {device} ({heads}{what}): {worst} "
            f"differs from the definition by {errors[worst]:.1e} in norm, expected at most {LIMITS[model.dtype]:.0e}; "
            f"run `python -m training.doctor`, and {way_out}, or model.check_attention=false to go on with it"
        )


def shared_row(prefix_len: int, suffix_lens: Sequence[int]) -> Borders:
    """A row of one group: the prefix, then suffixes that see it and themselves; the last suffix stands alone behind."""
    edges = [0, *accumulate((prefix_len, *suffix_lens))]
    prefix, *suffixes = list(pairwise(edges))
    shared = [Segment(own, (prefix, own)) for own in suffixes[:-1]]
    return Borders([Segment(prefix, (prefix,)), *shared, Segment(suffixes[-1], (suffixes[-1],))], is_causal=True)


def attention_errors(
    model: PreTrainedModel, heads: Heads, borders: Borders, device: torch.device, dtype: torch.dtype
) -> dict[str, float]:
    """Of one row with these borders of samples (or images): |got - expected| / |expected| in norm, for the output and
    the gradients of query, key and value; infinite where something is NaN or missing.

    model: whose attention is called; its layers are not, so that `heads` may be others than its own.
    """
    generator = torch.Generator().manual_seed(0)
    num = borders.num_tokens
    shapes = [(num, count, heads.width) for count in (heads.heads, heads.kv_heads, heads.kv_heads)]
    rows = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    direction = torch.randn(shapes[0], generator=generator).to(dtype)
    scaling = heads.width**-0.5

    exact = [row.double().requires_grad_() for row in rows]
    query, key, value = exact
    expected = attention_by_definition(query, key, value, borders, scaling=scaling)
    (expected * direction.double()).sum().backward()

    on_device = [row.to(device).requires_grad_() for row in rows]
    got = attention_of(model, heads, borders, device)(*on_device)
    (got * direction.to(device)).sum().backward()
    pairs = {"its output": (got, expected)}
    names = ("the gradient of queries", "the gradient of keys", "the gradient of values")
    pairs |= {name: (x.grad, y.grad) for name, x, y in zip(names, on_device, exact, strict=True)}
    return {name: _difference(*pair) for name, pair in pairs.items()}


def attention_of(
    model: PreTrainedModel, heads: Heads, borders: Borders, device: torch.device
) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """What the model's layers of this tower call, for one packed row: query (T, H, E), key and value (T, H_kv, E) on
    the device -> (T, H, E)."""
    function = AttentionInterface()[model.config._attn_implementation]
    layer, arguments = _stand_in(model, heads), _arguments(model, borders, device)

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        rows = [row.transpose(0, 1)[None] for row in (query, key, value)]
        return function(layer, *rows, None, dropout=0.0, scaling=heads.width**-0.5, **arguments)[0][0]

    return attend


def attention_by_definition(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    borders: Borders,
    *,
    scaling: float,
) -> torch.Tensor:
    """softmax(Q K^T * scaling + mask) V over a whole row, (T, H, E): a token sees the keys of its segment, and if
    causal nothing behind itself. key and value: (T, H_kv, E), each shared by H / H_kv heads in a row."""
    seen = torch.zeros(borders.num_tokens, borders.num_tokens, dtype=torch.bool)
    for (start, stop), ranges in borders.segments:
        for first, last in ranges:
            seen[start:stop, first:last] = True
        if borders.is_causal:
            seen[start:stop, start:stop].tril_()
    group = query.shape[1] // key.shape[1]
    key, value = (row.repeat_interleave(group, dim=1) for row in (key, value))
    scores = torch.einsum("qhe,khe->hqk", query, key) * scaling
    return torch.einsum("hqk,khe->qhe", scores.masked_fill(~seen, -torch.inf).softmax(-1), value)


def _arguments(model: PreTrainedModel, borders: Borders, device: torch.device) -> dict[str, Any]:
    """As the layers of the tower are given them."""
    cumulative = {
        name: torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
        for name, lengths in (("cu_seq_lens_q", borders.lengths), ("cu_seq_lens_k", borders.key_lengths))
    }
    arguments: dict[str, Any] = cumulative
    arguments |= dict.fromkeys(("max_length_q", "max_length_k"), max(borders.key_lengths))
    if takes_borders(model):
        arguments["row_borders" if borders.is_causal else "borders"] = borders
    return arguments if borders.is_causal else arguments | {"is_causal": False}


def _stand_in(model: PreTrainedModel, heads: Heads) -> nn.Module:
    """What attention functions read of the layer that calls them; eager attention is looked up in its module."""
    layer_class = type(model.model.visual.blocks[0].attn)
    layer = type(layer_class.__name__, (nn.Module,), {"__module__": layer_class.__module__})()
    layer.is_causal, layer.num_key_value_groups = heads.is_causal, heads.heads // heads.kv_heads
    layer.config = model.config
    return layer


def _difference(got: torch.Tensor | None, expected: torch.Tensor | None) -> float:
    assert expected is not None
    if got is None:
        return float("inf")
    error = float((got.detach().double().cpu() - expected.detach()).norm() / expected.detach().norm())
    return float("inf") if math.isnan(error) else error
