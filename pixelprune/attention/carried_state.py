"""A shared prefix in a family with linear-attention layers: what its suffixes need of it, handed on with its gradients.

    L = tokens of the row, D = model width, n = suffixes of a batch

The state of such a layer runs along the row, so that a prefix cannot stand in one row with several suffixes. It is a
row of its own here, computed first: the recurrent state and the last inputs of the convolution after its last token,
and the keys and values of the layers with full attention, begin each suffix, and the gradients of all suffixes meet in
them. The stock forward takes all that as a cache. The stock cache itself overwrites states in place, which the
backward pass refuses; the one made here keeps every state as a tensor of its own.

Recomputation drops a layer's cache without a word (transformers), so that there is none here.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from pixelprune.attention.borders import Borders
from pixelprune.pack import Pack

__all__ = ["carried_hidden"]

LEAST_LEN = 2
"""Tokens of a row behind a cache: for a single one the stock layers take the way of generation, in place."""
Range = tuple[int, int]


class _Batch(NamedTuple):
    """Segments of one length, about, in one right-padded batch, and the prefix, by its number, that they continue."""

    segments: Sequence[int]
    prefix: int | None


def carried_hidden(
    model: Any, pack: Pack, features: Sequence[torch.Tensor], group_by_length: Any, filler: int
) -> torch.Tensor:
    """Final hidden states (L, D) of a row whose samples share prefixes, in its order; equal to its samples apart.

    features: of each image in the row, (kept, D). group_by_length: lengths to groups that share a batch. filler: a
    token to pad with. Raises ValueError for a model whose language layers are recomputed.
    """
    text = model.model.language_model
    if text.training and any(getattr(layer, "gradient_checkpointing", False) for layer in text.layers):
        raise ValueError(
            "a row whose samples share a prefix, in a model with linear-attention layers: recomputed layers lose what "
            "the prefix hands on; set model.recompute_llm=0, or pack without groups"
        )
    ranges = [segment.queries for segment in pack.borders.segments]
    images = [features[first:last] for first, last in pairwise([0, *accumulate(pack.num_images_per_segment)])]
    hidden: dict[int, torch.Tensor] = {}
    caches: dict[int, Any] = {}
    for segments, prefix in _batches(pack.borders, group_by_length):
        is_prefix = any(number in _prefixes(pack.borders).values() for number in segments)
        cache = _new_cache(model) if is_prefix else None
        if prefix is not None:
            cache = _handed_on(model, caches[prefix], len(segments))
        output = _forward(model, pack, [ranges[n] for n in segments], [f for n in segments for f in images[n]],
                          cache, filler)  # fmt: skip
        for row, number in enumerate(segments):
            hidden[number] = output[row, : ranges[number][1] - ranges[number][0]]
        if is_prefix:
            caches[segments[0]] = cache
    return torch.cat([hidden[number] for number in range(len(ranges))])


def _prefixes(borders: Borders) -> dict[int, int]:
    """Of each suffix, the number of the segment that it continues."""
    numbers = {segment.queries: number for number, segment in enumerate(borders.segments)}
    return {
        number: numbers[segment.keys[0]] for number, segment in enumerate(borders.segments) if len(segment.keys) > 1
    }


def _batches(borders: Borders, group_by_length: Any) -> list[_Batch]:
    """Prefixes one by one, whose states are those of their last token; then their suffixes; what stands alone."""
    prefixes = _prefixes(borders)
    owners = sorted(set(prefixes.values()))
    alone = [n for n in range(len(borders.segments)) if n not in prefixes and n not in owners]
    found = [_Batch([owner], None) for owner in owners]
    for prefix, members in [(None, alone), *((o, [n for n in prefixes if prefixes[n] == o]) for o in owners)]:
        groups = group_by_length([borders.lengths[number] for number in members])
        found += [_Batch([members[place] for place in group], prefix) for group in groups]
    return found


def _forward(
    model: Any, pack: Pack, ranges: list[Range], images: Sequence[torch.Tensor], cache: Any, filler: int
) -> torch.Tensor:
    """The stock language model on stretches of the row as a right-padded batch: (n, longest, D).

    Padding continues the count in row 0 of the positions: a break would be read as a border.
    """
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    begins = 0 if cache is None else cache.get_seq_length()
    longest = max(stop - start for start, stop in ranges)
    longest = max(longest, LEAST_LEN) if begins else longest

    def padded(row: torch.Tensor, value: int) -> torch.Tensor:
        """(..., L) -> (..., n, longest)."""
        parts = [functional.pad(row[..., a:b], (0, longest - (b - a)), value=value) for a, b in ranges]
        return torch.stack(parts, dim=-2)

    counts = torch.arange(begins, begins + longest, device=pack.input_ids.device).expand(1, len(ranges), longest)
    # No hybrid family has DeepStack features.
    encoded = {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=images)}} if images else {}
    return model.model(
        input_ids=padded(pack.input_ids, filler),
        position_ids=torch.cat([counts, padded(pack.position_ids[1:], 0)]),
        past_key_values=cache,
        use_cache=cache is not None,
        **encoded,
    ).last_hidden_state


def _new_cache(model: Any) -> Any:
    from transformers import DynamicCache
    from transformers.cache_utils import LinearAttentionLayer

    class Carried(LinearAttentionLayer):
        """States as tensors of their own: nothing that the backward pass needs is overwritten."""

        def update_conv_state(
            self, conv_states: torch.Tensor, state_idx: int = 0, conv_kernel_size: int | None = None, **kwargs: Any
        ) -> torch.Tensor:
            """The inputs of the convolution, with those before them; (n, channels, at least the kernel's size)."""
            size = conv_kernel_size or conv_states.shape[-1]
            if self.has_previous_state[state_idx]:
                whole = torch.cat([self.conv_states[state_idx], conv_states], dim=-1)
            else:
                whole = functional.pad(conv_states, (max(0, size - conv_states.shape[-1]), 0))
            self.has_previous_state[state_idx] = self.is_conv_states_initialized[state_idx] = True
            self.conv_states[state_idx] = whole[..., -size:]
            return whole

        def update_recurrent_state(
            self, recurrent_states: torch.Tensor, state_idx: int = 0, **kwargs: Any
        ) -> torch.Tensor:
            self.is_recurrent_states_initialized[state_idx] = True
            self.recurrent_states[state_idx] = recurrent_states
            return recurrent_states

    cache = DynamicCache(config=model.config)
    cache.layers = [Carried() if isinstance(layer, LinearAttentionLayer) else layer for layer in cache.layers]
    return cache


def _handed_on(model: Any, prefix: Any, num: int) -> Any:
    """The prefix's cache for a batch of `num` suffixes; the prefix's own stays as it is."""
    cache = _new_cache(model)
    for mine, of in zip(cache.layers, prefix.layers, strict=True):
        if hasattr(of, "recurrent_states"):
            mine.conv_states[0] = of.conv_states[0].expand(num, -1, -1)
            mine.recurrent_states[0] = of.recurrent_states[0].expand(num, -1, -1, -1)
            mine.has_previous_state[0] = True
            mine.is_conv_states_initialized[0] = mine.is_recurrent_states_initialized[0] = True
        else:
            mine.update(of.keys.expand(num, -1, -1, -1), of.values.expand(num, -1, -1, -1))
    return cache
