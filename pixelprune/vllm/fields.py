"""What travels from vLLM's front end to its workers for pruned images."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch

from pixelprune.images.image import PrunedImage
from pixelprune.images.patches import patches_of_blocks
from pixelprune.pack import VisionGeometry, normalise_blocks
from pixelprune.settings import BLOCK, MERGE

# I = images, B = blocks of all images before pruning, K = kept blocks, P = 4 K patches


def image_fields(
    images: Sequence[PrunedImage], geometry: VisionGeometry | None, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """The fields of vLLM's multimodal items.

    geometry: the normalisation, where pixels are normalised in the front end; None where the device does it.
    pixel_values: uint8 (K, 3072), the kept blocks; or, normalised, their patches in `dtype`, one block per row.
    image_grid_thw: int64 (I, 3), the *full* grids in patches. image_keep: bool (B,).
    """
    blocks = torch.from_numpy(np.concatenate([image.blocks for image in images]))
    pixels = blocks if geometry is None else normalise_blocks(blocks, geometry).to(dtype)
    shapes = [image.selection.keep.shape for image in images]
    return {
        "pixel_values": pixels.reshape(len(blocks), -1),
        "image_grid_thw": torch.tensor([[1, MERGE * rows, MERGE * cols] for rows, cols in shapes]),
        "image_keep": torch.from_numpy(np.concatenate([image.selection.keep.reshape(-1) for image in images])),
    }


def patches_of_fields(pixel_values: torch.Tensor, temporal_patch: int) -> torch.Tensor:
    """(P, 3 * temporal * 256): the stock vision tower's input, uint8 where the device normalises it."""
    if pixel_values.dtype == torch.uint8:
        return patches_of_blocks(pixel_values.view(-1, BLOCK, BLOCK, 3), temporal_patch)
    return pixel_values.reshape(len(pixel_values) * MERGE**2, -1)


def kept_counts(keep: torch.Tensor, num_blocks: Sequence[int]) -> list[int]:
    """Kept blocks of each image, from the mask (B,) of all of them."""
    counts = torch.nn.functional.pad(keep.cumsum(0), (1, 0)).tolist()
    borders = np.cumsum([0, *num_blocks]).tolist()
    return [counts[stop] - counts[start] for start, stop in pairwise(borders)]
