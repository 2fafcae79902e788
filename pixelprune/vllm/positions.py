"""MRoPE positions of a pruned prompt: vLLM's own rule over the *unpruned* one, of which the kept columns are taken."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from pixelprune.settings import MERGE

# L = tokens of the prompt, U = tokens it would have without pruning

Rule = Callable[[list[int], list[Any]], tuple[torch.Tensor, int]]


def kept_positions(stock_rule: Rule, tokens: list[int], features: list[Any]) -> tuple[torch.Tensor, int]:
    """Positions int64 (3, L) and what is added to a token's number to give the position of a generated one.

    stock_rule: (U tokens, features at their places in them) -> positions (3, U) and that difference.
    features: vLLM's, with `image_keep` and `image_grid_thw`; other kinds than images raise ValueError.
    """
    unpruned: list[int] = []
    columns: list[torch.Tensor] = []
    moved, cut = [], 0
    for feature in sorted(features, key=lambda feature: feature.mm_position.offset):
        keep = _keep_of(feature)
        place = feature.mm_position
        text = tokens[cut : place.offset]
        unpruned += text
        columns += [torch.ones(len(text), dtype=torch.bool), keep]
        moved.append(
            dataclasses.replace(feature, mm_position=dataclasses.replace(place, offset=len(unpruned), length=len(keep)))
        )
        unpruned += [tokens[place.offset]] * len(keep)
        cut = place.offset + place.length
    unpruned += tokens[cut:]
    columns.append(torch.ones(len(tokens) - cut, dtype=torch.bool))
    positions, _ = stock_rule(unpruned, moved)
    kept = positions[:, torch.cat(columns)]
    assert kept.shape[1] == len(tokens), f"{kept.shape[1]} positions for {len(tokens)} tokens"
    return kept, int(positions.max()) + 1 - len(tokens)


def check_positions(images: Sequence[tuple[int, tuple[int, int]]], max_model_len: int, num_positions: int) -> None:
    """Raises ValueError for a request whose positions could pass the end of the model's rotary table.

    An image advances positions by its longer side and tokens by its kept blocks, so positions may run ahead of tokens;
    vLLM's table ends where its tokens do. images: (kept blocks, (rows, cols)) in order; num_positions: of the table.
    """
    ahead = furthest = 0
    for num_kept, grid in images:
        ahead += max(grid) - num_kept
        furthest = max(furthest, ahead)
    if max_model_len + furthest > num_positions:
        raise ValueError(
            f"the images keep so few blocks that positions run {furthest} ahead of tokens; with --max-model-len "
            f"{max_model_len} they could pass the model's {num_positions} positions. Start the server with "
            f"--max-model-len {num_positions - furthest} or less"
        )


def _keep_of(feature: Any) -> torch.Tensor:
    """bool (blocks of the image,). Raises ValueError for a feature that did not come through our processor."""
    if feature.modality != "image" or feature.data is None or "image_keep" not in feature.data:
        raise ValueError(f"{feature.modality}: expected an image with its keep mask; this model is served pruned")
    keep = feature.data["image_keep"].data
    _, height, width = feature.data["image_grid_thw"].data.tolist()
    assert keep.numel() * MERGE**2 == height * width, f"mask of {keep.numel()} blocks for {height} x {width} patches"
    assert int(keep.sum()) == feature.mm_position.length, f"{int(keep.sum())} kept, {feature.mm_position.length} places"
    return keep
