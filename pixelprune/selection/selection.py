"""Which blocks of an image are kept, and which kept block stands for each omitted one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pixelprune.settings import BLOCK, PruneSettings

METRICS = ("max", "mae")
DIRECTIONS = ("auto", "backward", "forward")
BUDGETS = ("pred2d", "pred3d")


@dataclass(frozen=True)
class Selection:
    """The result of `select` for one image of (rows, cols) blocks.

    keep: bool (rows, cols), True where the block is kept.
    source: int32 (rows, cols), flat index (row * cols + col) of the kept block whose pixels stand here after decoding.
        The baselines predict nothing: their omitted blocks have source -1.
    image: int32 (rows, cols), number of the image of the conversation that this block lies in; None: of this one.
    """

    keep: np.ndarray
    source: np.ndarray
    image: np.ndarray | None = None

    @property
    def num_kept(self) -> int:
        return int(self.keep.sum())

    @property
    def num_blocks(self) -> int:
        return int(self.keep.size)

    @property
    def retain_ratio(self) -> float:
        return self.num_kept / self.num_blocks


def check_image(image: np.ndarray, block: int = BLOCK) -> None:
    """ValueError unless `image` is a non-empty uint8 array (height, width, 3) with both sides multiples of `block`."""
    if not isinstance(block, int) or block < 1:
        raise ValueError(f"block: expected a positive number of pixels, got {block!r}")
    if not isinstance(image, np.ndarray):
        raise ValueError(f"image: expected a numpy array, got {type(image).__name__}")
    if image.dtype != np.uint8:
        raise ValueError(f"image: expected dtype uint8 (0..255), got {image.dtype}")
    if image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"image: expected shape (height, width, 3) in RGB order, got {image.shape}")
    height, width = image.shape[:2]
    if height == 0 or width == 0:
        raise ValueError(f"image: expected at least one pixel, got {height} x {width}")
    if height % block or width % block:
        raise ValueError(
            f"image: expected height and width to be multiples of {block}, got {height} x {width}; "
            "resize to the size given by pixelprune.fit_size first"
        )


def check_settings(settings: PruneSettings) -> None:
    """ValueError unless metric and threshold are usable; the strategy's name is checked by the registry."""
    if settings.metric not in METRICS:
        raise ValueError(f"prune.metric: expected one of {', '.join(METRICS)}, got {settings.metric!r}")
    if not 0 <= settings.threshold <= 1:
        raise ValueError(
            f"prune.threshold: expected 0..1 (a distance of pixels scaled to [0, 1]), got {settings.threshold!r}"
        )
    if settings.direction not in DIRECTIONS:
        raise ValueError(f"prune.direction: expected one of {', '.join(DIRECTIONS)}, got {settings.direction!r}")
    if settings.budget not in BUDGETS:
        raise ValueError(f"prune.budget: expected one of {', '.join(BUDGETS)}, got {settings.budget!r}")
