"""The Hugging Face processor's resize rule: multiples of a block, a pixel budget, an aspect limit, a record's wish."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pixelprune.settings import BLOCK, ResizeSettings

__all__ = ["NO_WISH", "SizeWish", "fit_size", "wished_size"]

FEWEST_BLOCKS, MOST_BLOCKS = 4, 16384
"""Limits of an image that states none (IMAGE_MIN_TOKEN_NUM and IMAGE_MAX_TOKEN_NUM of qwen_vl_utils 0.0.14)."""


@dataclass(frozen=True)
class SizeWish:
    """What a record says about one image's size after resizing, in the words of qwen_vl_utils' `fetch_image`.

    min_pixels, max_pixels: total pixels; 0 where the record says nothing. resized_height, resized_width: pixels, both
    or none; they decide alone, whatever the limits are, as there.
    """

    min_pixels: int = 0
    max_pixels: int = 0
    resized_height: int = 0
    resized_width: int = 0

    def __post_init__(self) -> None:
        sides = self.resized_height, self.resized_width
        if any(sides) and min(sides) < BLOCK:
            raise ValueError(f"expected resized_height and resized_width, both {BLOCK} pixels or more, got {sides}")
        if self.max_pixels and self.min_pixels > self.max_pixels:
            raise ValueError(f"expected min_pixels <= max_pixels, got {self.min_pixels} and {self.max_pixels}")

    @property
    def stated(self) -> dict[str, int]:
        """What is said, under the published keys."""
        return {key: value for key, value in vars(self).items() if value}


NO_WISH = SizeWish()


def wished_size(height: int, width: int, resize: ResizeSettings, wish: SizeWish = NO_WISH) -> tuple[int, int]:
    """(height, width) in pixels after resizing of a picture of this size, as settings and record say.

    A limit that the record does not state is the setting's; where that contradicts the record's, it is qwen_vl_utils'.
    Raises ValueError as `fit_size` does, and for a size beyond resize.max_decoded_pixels.
    """
    least, most = FEWEST_BLOCKS * BLOCK**2, MOST_BLOCKS * BLOCK**2
    if wish.resized_height:
        return fit_size(wish.resized_height, wish.resized_width, min_pixels=least, max_pixels=most, factor=BLOCK)
    min_pixels, max_pixels = wish.min_pixels or resize.min_pixels, wish.max_pixels or resize.max_pixels
    if min_pixels > max_pixels and wish.min_pixels:
        max_pixels = most
    elif min_pixels > max_pixels and wish.max_pixels:
        min_pixels = least
    size = fit_size(height, width, min_pixels=min_pixels, max_pixels=max_pixels, factor=BLOCK)
    if wish.stated and math.prod(size) > resize.max_decoded_pixels:
        raise ValueError(
            f"the record's {wish.stated} make it {size[1]}x{size[0]}, more than "
            f"resize.max_decoded_pixels={resize.max_decoded_pixels}"
        )
    return size


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
