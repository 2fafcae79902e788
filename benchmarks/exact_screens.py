"""Synthetic screenshots of a given size that pred2d prunes to exactly a given number of blocks.

A page of one colour with lines of "text": blocks that are unlike each other and unlike the page. Which blocks they are
is searched until pred2d at threshold 0 keeps exactly the number asked for. Real screenshots are for real ratios
(`--images`); these are for a measurement at 40 % and not at about 40 %.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
from PIL import Image

from pixelprune.selection import select
from pixelprune.settings import BLOCK

ASPECT = 1.6
LONGEST_RUN = 12
PAGE, INK = (246, 247, 249), (38, 42, 54)
DOTS = 8
"""A block of text shows DOTS x DOTS dots."""


def grid_of(megapixels: float) -> tuple[int, int]:
    """(rows, cols) in blocks of the screenshot nearest to that size with an aspect ratio of 16:10."""
    pixels = megapixels * 1e6
    cols = max(1, round(math.sqrt(pixels * ASPECT) / BLOCK))
    return max(1, round(pixels / (BLOCK * BLOCK * cols))), cols


def exact_layout(rows: int, cols: int, num_kept: int, seed: int) -> np.ndarray:
    """int32 (rows, cols): 0 where the page shows, another number in every other block; pred2d keeps `num_kept`.

    Raises ValueError for a number that no search reaches (0, or more blocks than there are).
    """
    if not 1 <= num_kept <= rows * cols:
        raise ValueError(f"num_kept: expected 1 to {rows * cols} for {rows} x {cols} blocks, got {num_kept}")
    rng = np.random.default_rng(seed)
    layout, kept = np.zeros((rows, cols), dtype=np.int32), 1
    refused = 0
    while kept < num_kept and refused < 50:  # runs while they fit, single blocks for the rest
        row, col, length = rng.integers(rows), rng.integers(cols), rng.integers(1, LONGEST_RUN + 1)
        layout, kept, took = _with_text(layout, kept, num_kept, np.s_[row, col : col + length])
        refused = 0 if took else refused + 1
    while kept < num_kept:
        before = int((layout > 0).sum())
        for place in rng.permutation(rows * cols):
            layout, kept, _ = _with_text(layout, kept, num_kept, np.unravel_index(place, layout.shape))
            if kept == num_kept:
                break
        if int((layout > 0).sum()) == before:
            raise ValueError(f"found no page of {rows} x {cols} blocks of which exactly {num_kept} are kept")
    return layout


def _with_text(layout: np.ndarray, kept: int, limit: int, where) -> tuple[np.ndarray, int, bool]:
    """The layout with these places made unique, unless pred2d then keeps more than `limit`."""
    tried = layout.copy()
    tried[where] = np.arange(tried.size, dtype=np.int32).reshape(tried.shape)[where] + 1
    num = num_kept_of(tried)
    return (tried, num, True) if num <= limit else (layout, kept, False)


def num_kept_of(layout: np.ndarray) -> int:
    """Blocks that pred2d keeps of this layout, every block taken as one pixel."""
    pixels = np.stack([layout >> 16, layout >> 8, layout], axis=-1).astype(np.uint8)
    return select(pixels, block=1).num_kept


def draw_layout(layout: np.ndarray, seed: int) -> Image.Image:
    """The picture of a layout; text blocks carry their own number in dots, so that no two are alike."""
    rows, cols = layout.shape
    rng = np.random.default_rng([seed, 1])
    dots = rng.random((rows, cols, DOTS * DOTS)) < 0.4
    bits = np.arange(24)
    dots[..., bits] = (layout[..., None] >> bits) & 1
    dots &= (layout > 0)[..., None]
    square = dots.reshape(rows, cols, DOTS, DOTS).swapaxes(1, 2).reshape(rows * DOTS, cols * DOTS)
    scale = BLOCK // DOTS
    pixels = np.where(square[..., None], np.uint8(INK), np.uint8(PAGE)).repeat(scale, axis=0).repeat(scale, axis=1)
    return Image.fromarray(pixels)


def write_exact_screens(folder: Path, num: int, megapixels: float, retain: float) -> Path:
    """`num` screenshots and a grounding record for each; returns the JSONL file."""
    rows, cols = grid_of(megapixels)
    num_kept = max(1, round(retain * rows * cols))
    images = []
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for seed in range(num):
        name = f"images/screen-{seed:03d}.png"
        draw_layout(exact_layout(rows, cols, num_kept, seed), seed).save(folder / name, compress_level=1)
        images.append(name)
    return write_records(folder, images)


def write_records(folder: Path, images: list[str]) -> Path:
    """One question about every image, answered with a point of always as many tokens: folder/records.jsonl."""
    path = folder / "records.jsonl"
    with path.open("w") as file:
        for number, image in enumerate(images):
            point = f"({100 + 7 * number % 900}, {100 + 11 * number % 900})"
            content = [
                {"type": "image", "image": image},
                {"type": "text", "text": "Click the button that saves the settings."},
            ]
            answer = [{"type": "text", "text": point}]
            messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"id": f"screen-{number:03d}", "messages": messages}) + "\n")
    return path
