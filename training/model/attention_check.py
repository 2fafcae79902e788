"""The attention that was chosen, against its definition, on the very device: milliseconds at the start of a run.

    T = tokens of a row, H / H_kv = heads of queries / keys, E = head width

A kernel built for another torch, a driver that is too old, an argument that a new version reads in another way: none of
them need raise an error. What is called here is what the model's layers will call, through the same name, with the
same arguments, forward and backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel

from pixelprune.attention.borders import Borders
from pixelprune.attention.segments import takes_borders
from training.errors import RankError

LIMITS = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-3}
"""Errors in norm, relative to the definition's. bfloat16 has 8 bits: 3e-3 when right, up to 9e-3 in gradients; a sample
that sees its neighbour is off by more than 0.1. float32 leaves room for TF32."""
_LENGTHS = (1, 9, 1, 14)


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


def check_attention(model: PreTrainedModel, device: torch.device) -> None:
    """Raises RankError naming the attention, the tower and the error where the model's attention computes wrong.

    Each rank looks at its own device: one broken GPU of many is what this finds, too.
    """
    for heads in heads_of(model.config):
        errors = attention_errors(model, heads, _LENGTHS, device, model.dtype)
        worst = max(errors, key=lambda name: errors[name])
        if errors[worst] > LIMITS[model.dtype]:
            raise RankError(
                f"attention {model.config._attn_implementation} computes wrong on {device} ({heads}): {worst} differs "
                f"from the definition by {errors[worst]:.1e} in norm, expected at most {LIMITS[model.dtype]:.0e}; run "
                "`python -m training.doctor`, and set model.attention=sdpa, or model.check_attention=false to go on "
                "with it"
            )


def attention_errors(
    model: PreTrainedModel, heads: Heads, lengths: Sequence[int], device: torch.device, dtype: torch.dtype
) -> dict[str, float]:
    """Of one packed row of samples (or images) of these lengths: |got - expected| / |expected| in norm, for the output
    and the gradients of query, key and value; infinite where something is NaN or missing.

    model: whose attention is called; its layers are not, so that `heads` may be others than its own.
    """
    generator = torch.Generator().manual_seed(0)
    num = sum(lengths)
    shapes = [(num, count, heads.width) for count in (heads.heads, heads.kv_heads, heads.kv_heads)]
    rows = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    direction = torch.randn(shapes[0], generator=generator).to(dtype)
    scaling = heads.width**-0.5

    exact = [row.double().requires_grad_() for row in rows]
    query, key, value = exact
    expected = attention_by_definition(query, key, value, lengths, scaling=scaling, is_causal=heads.is_causal)
    (expected * direction.double()).sum().backward()

    on_device = [row.to(device).requires_grad_() for row in rows]
    got = attention_of(model, heads, lengths, device)(*on_device)
    (got * direction.to(device)).sum().backward()
    pairs = {"its output": (got, expected)}
    names = ("the gradient of queries", "the gradient of keys", "the gradient of values")
    pairs |= {name: (x.grad, y.grad) for name, x, y in zip(names, on_device, exact, strict=True)}
    return {name: _difference(*pair) for name, pair in pairs.items()}


def attention_of(
    model: PreTrainedModel, heads: Heads, lengths: Sequence[int], device: torch.device
) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """What the model's layers of this tower call, for one packed row: query (T, H, E), key and value (T, H_kv, E) on
    the device -> (T, H, E)."""
    function = AttentionInterface()[model.config._attn_implementation]
    layer, borders = _stand_in(model, heads), _borders(model, lengths, heads.is_causal, device)

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        rows = [row.transpose(0, 1)[None] for row in (query, key, value)]
        return function(layer, *rows, None, dropout=0.0, scaling=heads.width**-0.5, **borders)[0][0]

    return attend


def attention_by_definition(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: Sequence[int],
    *,
    scaling: float,
    is_causal: bool,
) -> torch.Tensor:
    """softmax(Q K^T * scaling + mask) V over a whole row, (T, H, E): a token sees its own sample, and if causal nothing
    behind itself. key and value: (T, H_kv, E), each shared by H / H_kv heads in a row."""
    sample = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    seen = sample[:, None] == sample[None, :]
    if is_causal:
        seen = seen.tril()
    group = query.shape[1] // key.shape[1]
    key, value = (row.repeat_interleave(group, dim=1) for row in (key, value))
    scores = torch.einsum("qhe,khe->hqk", query, key) * scaling
    return torch.einsum("hqk,khe->qhe", scores.masked_fill(~seen, -torch.inf).softmax(-1), value)


def _borders(model: PreTrainedModel, lengths: Sequence[int], is_causal: bool, device: torch.device) -> dict[str, Any]:
    """As the layers of the tower are given them."""
    if takes_borders(model):
        name = "row_borders" if is_causal else "borders"
        borders: dict[str, Any] = {name: Borders.of_lengths(lengths, is_causal=is_causal)}
    else:
        cumulative = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
        borders = {"cu_seq_lens_q": cumulative, "cu_seq_lens_k": cumulative}
        borders |= dict.fromkeys(("max_length_q", "max_length_k"), max(lengths))
    return borders if is_causal else borders | {"is_causal": False}


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
