"""`select`: from an image and settings to the blocks that are kept."""

from __future__ import annotations

import numpy as np

from pixelprune.selection.selection import Selection, check_image, check_settings
from pixelprune.settings import BLOCK, PruneSettings


def select(
    image: np.ndarray,
    *,
    strategy: str = "pred2d",
    metric: str = "max",
    threshold: float = 0.0,
    seed: int = 0,
    block: int = BLOCK,
) -> Selection:
    """Choose the blocks of an image to keep (paper section 3; baselines of section 4).

    image: uint8 (height, width, 3), both sides multiples of `block` pixels.
    strategy: pred2d, raster, serpentine, none, or a baseline: random, conncomp, conncomp_cover.
    metric, threshold: a block is omitted when the largest ("max") or mean ("mae") absolute difference to its
        prediction, on pixels scaled to [0, 1], is at most `threshold`; 0 demands equality.
    seed: used by the baselines only.

    Pure and thread-safe; releases the GIL. The first call in a fresh install compiles (seconds); later ones do not.
    Raises ValueError for an image or a setting outside this.
    """
    from pixelprune.selection.registry import get_strategy  # numba loads here, not with the package

    settings = PruneSettings(strategy=strategy, metric=metric, threshold=threshold, seed=seed)
    check_settings(settings)
    check_image(image, block)
    return get_strategy(strategy).run(image, settings, block)
