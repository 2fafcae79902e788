"""The two settings that every part shares: how an image is sized and how its blocks are pruned."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

__all__ = ["BLOCK", "MERGE", "PATCH", "PruneSettings", "ResizeSettings"]

PATCH = 16
"""Side of a ViT patch, pixels."""
MERGE = 2
"""Patches per block side: the merger turns MERGE x MERGE patches into one LLM token."""
BLOCK = PATCH * MERGE
"""Side of a block, pixels: one block is one LLM token."""


@dataclass(frozen=True)
class PruneSettings:
    """Which blocks are omitted (see `pixelprune.select`). `strategy="none"` keeps all: the Full model."""

    strategy: str = "pred2d"
    """Which rule omits blocks: pred2d, pred3d (screenshots of a conversation together, docs/sessions.md), a scan order,
    or a baseline (docs/selection.md names them)."""
    metric: str = "max"
    """Distance of two blocks: max (largest difference of any value) or mae (mean of all)."""
    threshold: float = 0.0
    """Distance, 0 to 1, up to which a block counts as predicted; 0 omits only equal blocks and loses nothing."""
    seed: int = 0
    """Used by the random baselines only."""
    direction: str = "auto"
    """pred3d only: backward (each screenshot from the one after it, the last one whole: for answers behind the last
    image), forward (each from the one before it: for conversations that grow, and training on every turn), or auto:
    backward where data.last_turn_only is set, and for a prompt; forward otherwise."""
    keep_replaced: bool = True
    """pred3d, forward only: also keep what changed where pred2d keeps a block of the screenshot before, so that what
    vanished leaves a token."""
    budget: str = "pred2d"
    """Baselines only: as many blocks of an image as pred2d keeps of it, or pred3d in its conversation."""

    def resolved(self, *, last_turn_only: bool) -> PruneSettings:
        """With `direction` decided. last_turn_only: nothing before the last image is trained on or answered."""
        if self.direction != "auto":
            return self
        return dataclasses.replace(self, direction="backward" if last_turn_only else "forward")


@dataclass(frozen=True)
class ResizeSettings:
    """The Hugging Face processor's size limits (pixels after resizing) and our limit on what is decoded at all."""

    min_pixels: int = 256 * 256
    """Smaller images are enlarged to this many pixels."""
    max_pixels: int = 4096 * 4096
    """Larger images are shrunk to this many pixels."""
    max_decoded_pixels: int = 100_000_000
    """Images with more pixels than this are refused before decoding (decompression bombs). WebP and TIFF files of more
    than 178,956,970 pixels are refused by Pillow in any case."""
