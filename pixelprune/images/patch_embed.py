"""The patch embedding of a stock vision tower as the matrix product that it is.

    N = patches, C x T x P x P = channels, frames and pixels of a patch, D = width of the tower

Its Conv3d has the stride of its kernel and is handed patches of exactly that size: one product of (N, C T P P) with
(C T P P, D). The convolution libraries have no fast path for it: a quarter of a small model's step on a CPU
(docs/performance.md), and on GPUs, in bfloat16, reported to take seconds per call (huggingface/transformers issue
45750, pytorch issue 174051). transformers can exchange it too (`fusion_config`), for all models of the process and
with other names of the weights; here one model's layer computes otherwise, and its weights stay what they are called.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from pixelprune.images.patches import normalised_patches
from pixelprune.settings import BLOCK


def use_linear_patches(model: Any) -> None:
    """Let the patch embedding of this model compute a matrix product. Weights, names and other models stay as they are.

    Raises ValueError where it is no convolution over whole patches.
    """
    projection = model.model.visual.patch_embed.proj
    if not is_patch_product(projection):
        raise ValueError(
            f"the patch embedding: expected a Conv3d whose stride is its kernel, without padding, got {projection}"
        )
    # A method, not a closure: a copy of the model embeds with its own weights.
    projection.forward = MethodType(_linear_forward, projection)


def take_blocks(model: Any, geometry: Any) -> None:
    """Let this model take uint8 blocks as `pixel_values`, (K, 32, 32, 3), and normalise them where it computes.

    For rows of `PixelPruneCollator(..., pixels="blocks")`: an eighth of the bytes that normalised patches take on their
    way to the device, for K kept blocks, and the same numbers in the patch embedding.

    geometry: `pixelprune.pack.VisionGeometry` of the model. The patch embedding raises ValueError for anything else
    than blocks from here on, so a second call is one too many.
    """

    def normalise(_: nn.Module, arguments: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        (blocks,) = arguments
        if blocks.ndim != 4 or blocks.shape[1:] != (BLOCK, BLOCK, 3):
            raise ValueError(
                f"this model takes blocks: expected pixel_values of (K, {BLOCK}, {BLOCK}, 3), got "
                f"{tuple(blocks.shape)}; "
                'make rows with PixelPruneCollator(..., pixels="blocks")'
            )
        # The stock forward has made the tower's dtype of them; up to 255 every integer is exact in all of them.
        patches = normalised_patches(
            blocks.to(torch.uint8), geometry.image_mean, geometry.image_std, geometry.temporal_patch
        )
        return (patches.to(blocks.dtype),)

    model.model.visual.patch_embed.register_forward_pre_hook(normalise)


def is_patch_product(projection: nn.Module) -> bool:
    """Whether a module, given single patches, is one matrix product."""
    return (
        isinstance(projection, nn.Conv3d)
        and projection.stride == projection.kernel_size
        and projection.padding == (0, 0, 0)
        and projection.dilation == (1, 1, 1)
        and projection.groups == 1
    )


def _linear_forward(self: nn.Conv3d, patches: torch.Tensor) -> torch.Tensor:
    """(N, C, T, P, P) to (N, D, 1, 1, 1), what the convolution gives."""
    if patches.shape[2:] != self.kernel_size:
        raise ValueError(
            f"the patch embedding: expected single patches of {self.kernel_size} (frames, height, width), "
            f"got {tuple(patches.shape[2:])}"
        )
    return F.linear(patches.flatten(1), self.weight.flatten(1), self.bias)[:, :, None, None, None]
