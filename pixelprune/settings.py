"""The two settings that every part shares: how an image is sized and how its blocks are pruned."""

from __future__ import annotations

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
    metric: str = "max"
    threshold: float = 0.0
    seed: int = 0
    """Used by the random baselines only."""


@dataclass(frozen=True)
class ResizeSettings:
    """The Hugging Face processor's size limits (pixels after resizing) and our limit on what is decoded at all."""

    min_pixels: int = 256 * 256
    max_pixels: int = 4096 * 4096
    max_decoded_pixels: int = 100_000_000
    """Images with more pixels than this are refused before decoding (decompression bombs). WebP and TIFF files of more
    than 178,956,970 pixels are refused by Pillow in any case."""
