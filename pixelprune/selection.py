"""Which blocks of an image are kept, and which kept block stands for each omitted one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pixelprune.settings import BLOCK


@dataclass(frozen=True)
class Selection:
    """The result of `select` for one image of (rows, cols) blocks.

    keep: bool (rows, cols), True where the block is kept.
    source: int32 (rows, cols), flat index (row * cols + col) of the kept block whose pixels stand here after decoding.
    """

    keep: np.ndarray
    source: np.ndarray

    @property
    def num_kept(self) -> int:
        return int(self.keep.sum())

    @property
    def num_blocks(self) -> int:
        return int(self.keep.size)


def select(
    image: np.ndarray, *, strategy: str = "pred2d", metric: str = "max", threshold: float = 0.0, block: int = BLOCK
) -> Selection:
    """Exact pred2d in plain Python; the compiled library replaces this body."""
    rows, cols = image.shape[0] // block, image.shape[1] // block
    keep = np.ones((rows, cols), dtype=bool)
    source = np.arange(rows * cols, dtype=np.int32).reshape(rows, cols)
    if strategy == "none":
        return Selection(keep, source)
    blocks = image.reshape(rows, block, cols, block, 3).swapaxes(1, 2)

    def same(p: tuple[int, int], q: tuple[int, int]) -> bool:
        return np.array_equal(blocks[p], blocks[q])

    for r in range(rows):
        for c in range(cols):
            if r == 0 and c == 0:
                continue
            left, above, corner = (r, c - 1), (r - 1, c), (r - 1, c - 1)
            if r == 0:
                predicted = left
            elif c == 0:
                predicted = above
            else:
                predicted = above if same(corner, left) and not same(corner, above) else left
            if same(predicted, (r, c)):
                keep[r, c] = False
                source[r, c] = source[predicted]
    return Selection(keep, source)
