"""The method written out from its definition, slowly and without looking at the library, and images to try it on."""

from __future__ import annotations

import numpy as np


def distance(x: np.ndarray, y: np.ndarray, metric: str) -> float:
    """Distance of two uint8 blocks on pixels scaled to [0, 1]; one correctly rounded division of integers."""
    difference = np.abs(x.astype(np.int64) - y.astype(np.int64))
    if metric == "max":
        return int(difference.max()) / 255
    return int(difference.sum()) / (255 * difference.size)


def reference_select(
    image: np.ndarray, strategy: str, metric: str, threshold: float, block: int
) -> tuple[np.ndarray, np.ndarray]:
    """`keep` and `source` as lists would give them: the decoder's value of every block is carried along."""
    rows, cols = image.shape[0] // block, image.shape[1] // block
    value = {
        (r, c): image[r * block : (r + 1) * block, c * block : (c + 1) * block]
        for r in range(rows)
        for c in range(cols)
    }
    source = {place: place for place in value}
    keep = np.zeros((rows, cols), dtype=bool)

    def match(p: tuple[int, int], q: tuple[int, int]) -> bool:
        return distance(value[p], value[q], metric) <= threshold

    order = [(r, c) for r in range(rows) for c in range(cols)]
    if strategy == "serpentine":
        order = [(r, c if r % 2 == 0 else cols - 1 - c) for r, c in order]
    for index, (r, c) in enumerate(order):
        if strategy == "none" or index == 0:
            keep[r, c] = True
            continue
        if strategy in ("raster", "serpentine"):
            prediction = order[index - 1]
        elif r == 0:
            prediction = (r, c - 1)
        elif c == 0:
            prediction = (r - 1, c)
        else:
            a, b, corner = (r, c - 1), (r - 1, c), (r - 1, c - 1)
            prediction = b if match(corner, a) and not match(corner, b) else a
        if match((r, c), prediction):
            value[r, c] = value[prediction]
            source[r, c] = source[prediction]
        else:
            keep[r, c] = True
    flat = np.array([[source[r, c][0] * cols + source[r, c][1] for c in range(cols)] for r in range(rows)])
    return keep, flat


def mosaic(
    rng: np.random.Generator, rows: int, cols: int, block: int, num_tiles: int, step: int, noise: int
) -> np.ndarray:
    """A grid of tiles drawn from `num_tiles`, whose levels are `step` apart, with up to `noise` added per byte."""
    tiles = rng.integers(0, 200, size=3)[None, :] + step * np.arange(num_tiles)[:, None]
    picks = tiles[rng.integers(0, num_tiles, size=(rows, cols))]
    image = np.repeat(np.repeat(picks, block, axis=0), block, axis=1)
    if noise:
        image = image + rng.integers(0, noise + 1, size=image.shape)
    return np.clip(image, 0, 255).astype(np.uint8)


def gradient(rows: int, cols: int, block: int, per_row: float, per_col: float) -> np.ndarray:
    y, x = np.mgrid[0 : rows * block, 0 : cols * block]
    level = np.clip(y * per_row / block + x * per_col / block, 0, 255)
    return np.repeat(level[:, :, None], 3, axis=2).astype(np.uint8)


def page(height: int = 192, width: int = 320, seed: int = 0) -> np.ndarray:
    """A drawn page: bars, panels, rows of short strokes like text, and one noisy picture."""
    rng = np.random.default_rng(seed)
    image = np.full((height, width, 3), 250, dtype=np.uint8)
    image[:32] = (40, 60, 110)
    image[32:, :64] = (230, 235, 240)
    for top in range(40, height - 8, 16):
        for left in range(80, 80 + int(rng.integers(0, width - 90)), 7):
            image[top : top + int(rng.integers(2, 9)), left : left + 3] = 20
    image[height // 2 : height // 2 + 48, width // 2 : width // 2 + 80] = rng.integers(0, 256, size=(48, 80, 3))
    return image
