"""Attention of a row with borders through the stock functions, segment by segment: no (T, T) mask, on any device.

    T = tokens (or patches) of a row, H / H_kv = heads of queries / keys, E = head width,
    n / m = queries / keys of a segment

For everything that has no varlen kernel: CPUs, float32, older GPUs. The stock `sdpa` builds a (T, T) mask for a packed
row and works through it in every layer; here its kernels run once per sample, as they do for a sample alone. Borders
come as keyword arguments of the forward, not as state of a module, which recomputation and a teacher would overtake.

The names it is registered under hold "flash", which makes the stock vision tower hand over all images at once.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from pixelprune.attention.borders import Borders

KERNELS = ("sdpa", "eager")
"""Stock attention functions that can run segment by segment."""
_NAMES = {kernel: f"flash_segments_{kernel}" for kernel in KERNELS}


def use_borders(model: PreTrainedModel, kernel: str = "sdpa") -> None:
    """Switch this model, both towers, to attention per segment. No class and no other model changes."""
    name = _NAMES[kernel]
    AttentionInterface.register(name, _ATTENTIONS[kernel])
    AttentionMaskInterface.register(name, mask_beside_borders if kernel == "sdpa" else eager_mask_beside_borders)
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            part.config._attn_implementation = name


def takes_borders(model: Any) -> bool:
    """Whether the model's attention reads `Borders`. Stock functions swallow an argument they do not know."""
    functions = AttentionInterface()
    name = model.config._attn_implementation
    return name in functions and _names_borders(functions[name])


@lru_cache
def _names_borders(function: Callable[..., Any]) -> bool:
    return "row_borders" in inspect.signature(function).parameters


def segment_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    kernel: str = "sdpa",
    is_causal: bool | None = None,
    borders: Borders | None = None,
    row_borders: Borders | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers calls it: query (B, H, T, E), key and value (B, H_kv, T, E), result (B, T, H, E).

    borders: of the images of a vision row (the forward's `image_borders`); row_borders: of the samples of a token row,
    which reach the vision tower too and are not read there. Without them cumulative lengths are read from the device.
    A batch without any (padded batches, generation) runs through the stock function with its mask.

    Raises ValueError for a packed row without borders, and for borders of another row or tower.
    """
    causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
    stock = sdpa_attention_forward if kernel == "sdpa" else _eager_of(module)
    borders = row_borders if causal else borders
    if borders is None and cu_seq_lens_q is not None:
        borders = _read_borders(cu_seq_lens_q, causal)
    if borders is None:
        if attention_mask is not None and attention_mask.ndim == 1:
            raise ValueError(_NO_BORDERS)
        return stock(module, query, key, value, attention_mask, is_causal=causal, **kwargs)[0], None
    if query.shape[:1] + key.shape[2:3] != (1, borders.num_tokens) or query.shape[2] != borders.num_tokens:
        raise ValueError(
            f"attention: borders of a row of {borders.num_tokens} tokens, expected one row of as many without a cache, "
            f"got query {tuple(query.shape)}, key {tuple(key.shape)}; take both from one pack (pack.model_inputs)"
        )
    if borders.is_causal != causal:
        raise ValueError("attention: borders of samples in the vision tower, or of images in the language model")
    return _by_segment(stock, kernel, module, query, key, value, borders, kwargs), None


@torch.compiler.disable  # its loop would be unrolled: a version for every number of segments
def _by_segment(
    stock: Callable[..., Any],
    kernel: str,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    borders: Borders,
    kwargs: dict[str, Any],
) -> torch.Tensor:
    """The stock function for one segment after the other, put together again: (1, T, H, E)."""
    causal = borders.is_causal
    # Split, not sliced: the backward of a slice fills a whole row with zeros.
    queries = query.split(borders.lengths, dim=2)
    keys, values = (_seen(x, borders) for x in (key, value))
    parts = []
    for q, k, v in zip(queries, keys, values, strict=True):
        mask = _lower_right(q, k, kernel) if causal and (kernel == "eager" or q.shape[2] < k.shape[2]) else None
        parts.append(stock(module, q, k, v, mask, is_causal=causal, **kwargs)[0])
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _seen(x: torch.Tensor, borders: Borders) -> Sequence[torch.Tensor]:
    """Keys or values (1, H_kv, T, E) that each segment sees: (1, H_kv, m, E) of each."""
    own: tuple[torch.Tensor, ...] = x.split(borders.lengths, dim=2)
    if borders.are_apart:
        return own
    # A prefix is a segment of its own, so its gradient is the sum over its suffixes, without any row of zeros.
    at = {queries: part for (queries, _), part in zip(borders.segments, own, strict=True)}
    parts = [[at[keys] if keys in at else x[:, :, slice(*keys)] for keys in ranges] for _, ranges in borders.segments]
    return [part[0] if len(part) == 1 else torch.cat(part, dim=2) for part in parts]


def _lower_right(query: torch.Tensor, key: torch.Tensor, kernel: str) -> torch.Tensor:
    """What n queries at the end of m keys see, (1, 1, n, m): True for seen (sdpa), or 0 beside -inf (eager)."""
    n, m = query.shape[2], key.shape[2]
    seen = torch.ones(n, m, dtype=torch.bool, device=query.device).tril(m - n)[None, None]
    return seen if kernel == "sdpa" else torch.zeros_like(seen, dtype=query.dtype).masked_fill(~seen, -torch.inf)


def _read_borders(cumulative: torch.Tensor, is_causal: bool) -> Borders:
    """From int32 (S + 1,), for callers without a pack. Waits for the device."""
    return Borders.of_lengths(cumulative.diff().tolist(), is_causal=is_causal)


def _eager_of(module: nn.Module) -> Callable[..., Any]:
    """The eager function in the modeling file of a stock layer: transformers registers none under that name."""
    function: Callable[..., Any] = sys.modules[type(module).__module__].eager_attention_forward
    return function


_ATTENTIONS: dict[str, Callable[..., Any]] = {
    "sdpa": segment_attention,
    "eager": partial(segment_attention, kernel="eager"),
}


def mask_beside_borders(
    *,
    q_length: int,
    kv_length: int,
    attention_mask: torch.Tensor | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> torch.Tensor | None:
    """The mask beside attention with borders. Rows and batches of a training step need none, and none is built.

    transformers looks for borders in row 0 of 4-row positions. Where it found some, an empty marker (0,) is returned:
    the layers ignore it when they are given the borders, and refuse to run when they are not.
    Anything with padding or a cache (generation) gets the mask of sdpa.
    """
    if attention_mask is None and q_length == kv_length and not use_vmap:
        return None if allow_is_causal_skip else torch.empty(0, device=device)
    return sdpa_mask(
        q_length=q_length,
        kv_length=kv_length,
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip,
        use_vmap=use_vmap,
        device=device,
        **kwargs,
    )


def eager_mask_beside_borders(
    *, attention_mask: torch.Tensor | None = None, allow_is_causal_skip: bool = True, **kwargs: Any
) -> torch.Tensor:
    """The same for eager attention, which has no causal switch: batches without padding get a mask as well."""
    if attention_mask is None and not allow_is_causal_skip and kwargs["q_length"] == kwargs["kv_length"]:
        return torch.empty(0, device=kwargs.get("device", "cpu"))
    return eager_mask(attention_mask=attention_mask, allow_is_causal_skip=allow_is_causal_skip, **kwargs)


_NO_BORDERS = (
    "attention: a packed row came without its borders (cu_seq_lens_q, max_length_q), its samples would see each other; "
    "call the model through pixelprune.model_call.final_hidden or with pixelprune.pack.model_inputs"
)
