"""The Hugging Face processor's resize rule: multiples of a block, a pixel budget, an aspect limit."""

from __future__ import annotations

import math

__all__ = ["fit_size"]


def fit_size(
    height: int,
    width: int,
    *,
    min_pixels: int = 256 * 256,
    max_pixels: int = 4096 * 4096,
    factor: int = 32,
    max_aspect_ratio: float = 200,
) -> tuple[int, int]:
    """(height, width) in pixels after resizing, multiples of `factor`: what the HF processor computes, bit for bit.

    Sides go to the nearest multiple; a picture outside min_pixels..max_pixels (total pixels) is scaled to its limit
    first, keeping its shape. As there, a side never falls below one block, so a thin picture can exceed max_pixels.

    Raises ValueError for empty or too elongated pictures and for limits that no picture meets.
    """
    if height < 1 or width < 1:
        raise ValueError(f"expected a picture of at least 1x1 pixels, got {width}x{height}")
    if max(height, width) / min(height, width) > max_aspect_ratio:
        raise ValueError(f"expected an aspect ratio of at most {max_aspect_ratio}, got {width}x{height}")
    if not 1 <= min_pixels <= max_pixels:
        raise ValueError(f"resize: expected 1 <= min_pixels <= max_pixels, got {min_pixels} and {max_pixels}")
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    if new_height * new_width > max_pixels:
        shrink = math.sqrt((height * width) / max_pixels)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return new_height, new_width
