"""Prompts of a batch that begin alike: their common beginning computed once, its keys and values copied into each row.

    B = prompts of a left-padded batch, C = leading columns of the batch that are cached

The batch stays what it is without sharing, column for column; only where the first C columns come from differs. A key
carries its token's position, not its column's, so that one prefix serves rows padded by different amounts. C is what
the row with most tokens of its own allows: rows that have fewer compute the end of their prefix again, from the middle
of an image if need be.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch

from pixelprune.attention.prefixes import LEAST_SAVING, Group, find_groups
from pixelprune.sample import Sample

__all__ = ["SharedCache", "shared_cache"]


class SharedCache(NamedTuple):
    """cache: a DynamicCache of C columns. features: what the forward takes of images in the columns behind them."""

    cache: Any
    features: dict[str, Any]


def shared_cache(
    model: Any, samples: Sequence[Sample], image_token_id: int, encoded: dict[str, Any]
) -> SharedCache | None:
    """The first columns of the left-padded batch of these prompts, every shared prefix computed once.

    model: the stock model, in eval mode, without linear-attention layers: their state has no columns. encoded: the
    forward's features of all images, sample by sample. None where sharing would save less than an eighth of the tokens.
    """
    groups = find_groups(samples, image_token_id)
    own = [0] * len(samples)
    for group in groups:
        for member in group.members:
            own[member] = len(samples[member]) - (group.prefix_len if len(group.members) > 1 else 0)
    cached = [max(0, len(sample) - max(own)) for sample in samples]  # tokens of each row in the first C columns
    shared = [(group, max(cached[member] for member in group.members)) for group in groups]
    saved = sum(cached) - sum(length for _, length in shared)
    if saved < LEAST_SAVING * sum(map(len, samples)) or not saved:
        return None
    images = _FeaturesOfSamples(samples, image_token_id, encoded)
    prefixes = {group: _prefill(model, samples[group.members[0]], length, images.between(group.members[0], 0, length))
                for group, length in shared if length}  # fmt: skip
    columns = max(map(len, samples)) - max(own)
    rest = [images.between(number, start, len(samples[number])) for number, start in enumerate(cached)]
    return SharedCache(_laid_out(model, prefixes, cached, columns), _FeaturesOfSamples.as_argument(rest))


def _prefill(model: Any, sample: Sample, length: int, features: Any) -> Any:
    """The cache of a sample's first `length` tokens, computed as a row of its own."""
    from transformers import DynamicCache

    device = model.get_input_embeddings().weight.device
    cache = DynamicCache(config=model.config)
    positions = np.concatenate([np.arange(length)[None], sample.position_ids[:, :length]])
    model.model(
        input_ids=torch.from_numpy(sample.input_ids[:length])[None].to(device),
        position_ids=torch.from_numpy(positions)[:, None].to(device),
        past_key_values=cache,
        use_cache=True,
        **_FeaturesOfSamples.as_argument([features]),
    )
    return cache


def _laid_out(model: Any, prefixes: dict[Group, Any], cached: Sequence[int], columns: int) -> Any:
    """A cache of `columns` columns: each row's tokens at its end, zeros, which the mask hides, in front of them."""
    from transformers import DynamicCache

    cache, owner = DynamicCache(config=model.config), {m: of for group, of in prefixes.items() for m in group.members}
    for number, layer in enumerate(next(iter(prefixes.values())).layers):
        rows = []
        for row in (layer.keys, layer.values):
            shape = (len(cached), row.shape[1], columns, row.shape[3])
            rows.append(row.new_zeros(shape))
        for member, length in enumerate(cached):
            if length:
                source = owner[member].layers[number]
                for row, of in zip(rows, (source.keys, source.values), strict=True):
                    row[member, :, columns - length :] = of[0, :, :length]
        cache.update(*rows, number)
    return cache


class _FeaturesOfSamples:
    """Features of the image tokens in a stretch of a sample, out of those of all images."""

    def __init__(self, samples: Sequence[Sample], image_token_id: int, encoded: dict[str, Any]):
        self.output = encoded["mm_encoder_outputs"]["image"] if encoded else None
        self.borders = [0, *accumulate(len(sample.images) for sample in samples)]
        self.before = [np.concatenate([[0], np.cumsum(sample.input_ids == image_token_id)]) for sample in samples]

    def between(self, number: int, start: int, stop: int) -> Any:
        """A stock output with one entry, features of the image tokens among [start, stop); None without any."""
        first, last = (int(self.before[number][place]) for place in (start, stop))
        if first == last:
            return None
        assert self.output is not None, "placeholders have features"
        images = slice(self.borders[number], self.borders[number + 1])
        part = copy.copy(self.output)
        part.pooler_output = (torch.cat(list(self.output.pooler_output[images]))[first:last],)
        if layers := getattr(self.output, "deepstack_features", None):
            part.deepstack_features = [(torch.cat(list(layer[images]))[first:last],) for layer in layers]
        return part

    @staticmethod
    def as_argument(parts: Sequence[Any]) -> dict[str, Any]:
        """The forward's argument for stretches behind each other."""
        there = [part for part in parts if part is not None]
        if not there:
            return {}
        output = copy.copy(there[0])
        output.pooler_output = tuple(part.pooler_output[0] for part in there)
        if getattr(output, "deepstack_features", None):
            layers = zip(*(part.deepstack_features for part in there), strict=True)
            output.deepstack_features = [tuple(layer[0] for layer in row) for row in layers]
        return {"mm_encoder_outputs": {"image": output}}
