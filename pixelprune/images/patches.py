"""Kept blocks as the patches that the vision tower takes: the HF processor's layout, and its bits where normalised.

K = kept blocks, each of 2 x 2 patches
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

from pixelprune.settings import MERGE, PATCH

__all__ = ["normalised_patches", "patches_of_blocks"]


def normalised_patches(
    blocks: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...], temporal_patch: int
) -> torch.Tensor:
    """uint8 blocks (K, 32, 32, 3) to float32 patches (4 K, 3 * temporal * 256).

    Every uint8 value has one float32 image under scale and normalise, so a table looked up per channel gives the HF
    processor's bits on any device: it multiplies by 1/255 in float64, rounds to float32, then normalises in float32.
    """
    table = normalisation_table(mean, std, blocks.device)
    channel_offset = torch.arange(0, 3 * 256, 256, dtype=torch.int32, device=blocks.device).view(3, 1, 1)
    patches = _by_patch(blocks)
    # index_select: indexing with a tensor of this shape takes twice as long on a CPU.
    values = table.index_select(0, (patches.to(torch.int32) + channel_offset).flatten())
    return _twice(values.view(patches.shape), temporal_patch)


def patches_of_blocks(blocks: torch.Tensor, temporal_patch: int) -> torch.Tensor:
    """uint8 blocks (K, 32, 32, 3) to uint8 patches (4 K, 3 * temporal * 256)."""
    return _twice(_by_patch(blocks), temporal_patch)


def _by_patch(blocks: torch.Tensor) -> torch.Tensor:
    """(K, 32, 32, 3) to (K, 2, 2, 3, 16, 16): the patches of a block, row by row, channels first."""
    return blocks.view(len(blocks), MERGE, PATCH, MERGE, PATCH, 3).permute(0, 1, 3, 5, 2, 4)


def _twice(patches: torch.Tensor, temporal_patch: int) -> torch.Tensor:
    """(K, 2, 2, 3, 16, 16) to (4 K, 3 * temporal * 256): an image is a video whose frames are all the same."""
    frames = patches.unsqueeze(4).expand(-1, -1, -1, -1, temporal_patch, -1, -1)
    return frames.reshape(len(patches) * MERGE * MERGE, 3 * temporal_patch * PATCH * PATCH)


@lru_cache(maxsize=8)
def normalisation_table(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """float32 (768,): what becomes of the 256 values of each channel."""
    scaled = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
    per_channel = [(scaled - np.float32(m)) / np.float32(s) for m, s in zip(mean, std, strict=True)]
    return torch.from_numpy(np.concatenate(per_channel)).to(device)
