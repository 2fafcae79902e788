"""Pictures of a selection: omitted blocks greyed out, several selections side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pixelprune.selection import Selection

__all__ = ["draw_overlay", "side_by_side"]

_FADE = 0.25
_VEIL = np.array([112, 118, 140], dtype=np.float32)


def draw_overlay(image: np.ndarray, selection: Selection) -> np.ndarray:
    """The image with omitted blocks under a grey veil and kept ones untouched, uint8 (height, width, 3).

    image: uint8 (height, width, 3), the very image the selection was made on. ValueError if the sizes do not fit.
    """
    rows, cols = selection.keep.shape
    height, width = image.shape[:2]
    if height % rows or width % cols or height // rows != width // cols:
        raise ValueError(f"overlay: a selection of {rows} x {cols} blocks does not fit an image of {height} x {width}")
    block = height // rows
    tiles = image.reshape(rows, block, cols, block, 3).swapaxes(1, 2).copy()
    omitted = tiles[~selection.keep].astype(np.float32)
    grey = omitted.mean(axis=-1, keepdims=True)
    tiles[~selection.keep] = (_FADE * grey + (1 - _FADE) * _VEIL + 0.5).astype(np.uint8)
    return tiles.swapaxes(1, 2).reshape(image.shape)


def side_by_side(
    panels: Sequence[tuple[str, np.ndarray]], max_panel_width: int = 1280, num_cols: int | None = None
) -> Image.Image:
    """Captioned panels of one size in a grid about as wide as 16:9, each scaled down to at most `max_panel_width`.

    panels: (caption, uint8 (height, width, 3)). num_cols: instead, so many in a row.
    ValueError without panels or with panels of different sizes.
    """
    if not panels:
        raise ValueError("overlay: expected at least one panel")
    if len({panel.shape for _, panel in panels}) > 1:
        raise ValueError(f"overlay: expected panels of one size, got {sorted({panel.shape for _, panel in panels})}")
    height, width = panels[0][1].shape[:2]
    scale = min(1.0, max_panel_width / width)
    width, height = max(1, round(width * scale)), max(1, round(height * scale))
    gap = max(8, width // 80)
    font_size = max(12, width // 36)
    font = ImageFont.load_default(font_size)
    widest = max(width, *(math.ceil(font.getlength(caption)) for caption, _ in panels))
    cell_width, cell_height = widest + gap, height + 2 * font_size + gap
    num_cols = num_cols or min(
        range(1, len(panels) + 1),
        key=lambda n: (abs(math.log(n * cell_width / (math.ceil(len(panels) / n) * cell_height) * 9 / 16)), n),
    )
    num_rows = math.ceil(len(panels) / num_cols)
    sheet = Image.new("RGB", (num_cols * cell_width + gap, num_rows * cell_height + gap), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    for number, (caption, panel) in enumerate(panels):
        left, top = gap + number % num_cols * cell_width, gap + number // num_cols * cell_height
        draw.text((left, top + font_size * 0.3), caption, fill=(20, 20, 20), font=font)
        picture = Image.fromarray(panel)
        if picture.size != (width, height):
            picture = picture.resize((width, height), Image.Resampling.BOX if scale < 0.5 else Image.Resampling.BICUBIC)
        sheet.paste(picture, (left, top + 2 * font_size))
    return sheet
