"""What the vision tower needs of an image beside its pixels: places of the kept patches on the grid of the original.

P = ViT patches, I = images, K = kept blocks, P = 4 K
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

from pixelprune.attention.borders import Borders
from pixelprune.family import family_of
from pixelprune.images.image import PrunedImage
from pixelprune.settings import BLOCK, MERGE, PATCH

__all__ = ["VisionGeometry", "vision_fields"]


@dataclass(frozen=True)
class VisionGeometry:
    """What the builder needs to know of a model: the vision tower's grid, the pixel normalisation, and whether the
    language model has linear-attention layers, whose convolution takes sample borders as `seq_idx`."""

    image_token_id: int
    num_grid_per_side: int
    interpolation_mode: str
    align_corners: bool
    temporal_patch: int = 2
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)
    linear_attention: bool = False

    @classmethod
    def from_config(cls, config: Any, preprocessor: dict[str, Any] | None = None) -> VisionGeometry:
        """From a Hugging Face model config and, if at hand, the content of its preprocessor_config.json.

        Raises ValueError for an unsupported family or for patch sizes other than 16 with a merge of 2.
        """
        family, vision = family_of(config), config.vision_config
        if (vision.patch_size, vision.spatial_merge_size) != (PATCH, MERGE):
            raise ValueError(
                f"expected ViT patches of {PATCH} merged {MERGE}x{MERGE}, got patch_size={vision.patch_size}, "
                f"spatial_merge_size={vision.spatial_merge_size} in the model's config"
            )
        preprocessor = preprocessor or {}
        return cls(
            image_token_id=config.image_token_id,
            num_grid_per_side=int(vision.num_position_embeddings**0.5),
            interpolation_mode=family.interpolation_mode,
            align_corners=family.align_corners,
            temporal_patch=vision.temporal_patch_size,
            image_mean=tuple(preprocessor.get("image_mean", cls.image_mean)),
            image_std=tuple(preprocessor.get("image_std", cls.image_std)),
            linear_attention=family.linear_attention,
        )


def vision_fields(images: list[PrunedImage], geometry: VisionGeometry) -> dict[str, Any]:
    """`blocks` and the vit_ fields of `pixelprune.pack.Pack` for images behind each other."""
    if not images:
        return {
            "blocks": torch.empty(0, BLOCK, BLOCK, 3, dtype=torch.uint8),
            "vit_position_ids": torch.empty(0, 2, dtype=torch.int64),
            "vit_interp_indices": torch.empty(0, 4, dtype=torch.int64),
            "vit_interp_weights": torch.empty(0, 4, dtype=torch.float32),
            "vit_cu_seqlens": torch.zeros(1, dtype=torch.int32),
            "vit_max_seqlen": 0,
            "vit_borders": Borders([], is_causal=False),
        }
    grids = [_kept_rows(image.selection.keep, geometry) for image in images]
    num_patches = [len(positions) for positions, _, _ in grids]
    return {
        "blocks": torch.from_numpy(np.concatenate([image.blocks for image in images])),
        "vit_position_ids": torch.cat([positions for positions, _, _ in grids]),
        "vit_interp_indices": torch.cat([indices for _, indices, _ in grids]),
        "vit_interp_weights": torch.cat([weights for _, _, weights in grids]),
        "vit_cu_seqlens": torch.tensor([0, *accumulate(num_patches)], dtype=torch.int32),
        "vit_max_seqlen": max(num_patches),
        "vit_borders": Borders.of_lengths(num_patches, is_causal=False),
    }


def _kept_rows(keep: np.ndarray, geometry: VisionGeometry) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Position and interpolation rows of the kept patches, taken from those of the full grid."""
    full = _full_grid(keep.shape, geometry)
    kept_patches = torch.from_numpy(keep.reshape(-1)).repeat_interleave(MERGE * MERGE)
    return tuple(rows[kept_patches] for rows in full)


@lru_cache(maxsize=64)
def _full_grid(shape: tuple[int, int], geometry: VisionGeometry) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All rows of a grid of blocks, from the stock helpers. Screenshots come in few sizes, so they are remembered."""
    grid_thw = torch.tensor([[1, shape[0] * MERGE, shape[1] * MERGE]])
    indices, weights = get_vision_interpolation_indices_and_weights(
        grid_thw,
        num_grid_per_side=geometry.num_grid_per_side,
        mode=geometry.interpolation_mode,
        align_corners=geometry.align_corners,
        spatial_merge_size=MERGE,
    )
    return get_vision_position_ids(grid_thw, MERGE), indices, weights
