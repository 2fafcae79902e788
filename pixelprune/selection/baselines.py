"""The baselines of the paper (section 4), each at PixelPrune's budget for the image: random, conncomp, resize;
and conncomp_cover, which the paper has not.

The budget is the number of blocks that pred2d keeps under the same metric and threshold, unless another one is given.
"""

from __future__ import annotations

import dataclasses
import zlib

import numpy as np

from pixelprune.selection import kernels
from pixelprune.selection.selection import Selection
from pixelprune.selection.strategies import integer_limit, pixel_bytes, pred2d
from pixelprune.settings import BLOCK, PruneSettings

__all__ = [
    "AT_BUDGET",
    "block_budget",
    "budget_size",
    "component_shares",
    "conncomp",
    "conncomp_cover",
    "random",
    "resize",
]


def block_budget(image: np.ndarray, settings: PruneSettings, block: int = BLOCK) -> int:
    """Number of blocks PixelPrune (pred2d) keeps of this uint8 image (height, width, 3)."""
    return pred2d(image, dataclasses.replace(settings, strategy="pred2d"), block).num_kept


def budget_size(height: int, width: int, num_blocks: int, factor: int = BLOCK) -> tuple[int, int]:
    """The baseline "resize": (height, width) in pixels of the largest downscaled image that fits `num_blocks` blocks.

    Scaling by s <= 1 gives sides of round(side * s / factor) blocks, at least 1; the size returned belongs to the
    largest s that fits. ValueError for an empty image or a budget below one block.
    """
    if height < 1 or width < 1 or factor < 1:
        raise ValueError(
            f"expected a picture of at least 1x1 pixels and a positive factor, got {width}x{height}, {factor}"
        )
    if num_blocks < 1:
        raise ValueError(f"num_blocks: expected a budget of at least one block, got {num_blocks}")
    rows, cols = max(1, (2 * height + factor) // (2 * factor)), max(1, (2 * width + factor) // (2 * factor))
    while rows * cols > num_blocks:
        # Shrinking, a side of n blocks loses one at s = (2n - 1) * factor / (2 * side): go on to the larger such s.
        next_by_height, next_by_width = (2 * rows - 1) * width, (2 * cols - 1) * height
        if cols == 1 or (rows > 1 and next_by_height > next_by_width):
            rows -= 1
        elif rows == 1 or next_by_height < next_by_width:
            cols -= 1
        else:
            rows, cols = rows - 1, cols - 1
    return rows * factor, cols * factor


def _generator(image: np.ndarray, seed: int) -> np.random.Generator:
    # The pixels take part, so that images of one size do not all keep the same places.
    return np.random.default_rng([seed, zlib.crc32(pixel_bytes(image).data)])


def _selection(chosen: np.ndarray, grid: tuple[int, int]) -> Selection:
    keep = np.zeros(grid[0] * grid[1], dtype=bool)
    keep[chosen] = True
    source = np.where(keep, np.arange(keep.size), -1).astype(np.int32)
    return Selection(keep.reshape(grid), source.reshape(grid))


def random(image: np.ndarray, settings: PruneSettings, block: int, budget: int | None = None) -> Selection:
    """A uniformly random subset of the budget's size; a function of pixels and seed. Omitted blocks have source -1."""
    grid = (image.shape[0] // block, image.shape[1] // block)
    budget = budget or block_budget(image, settings, block)
    chosen = _generator(image, settings.seed).choice(grid[0] * grid[1], size=budget, replace=False)
    return _selection(chosen, grid)


def component_shares(sizes: np.ndarray, budget: int, generator: np.random.Generator) -> np.ndarray:
    """How many blocks each component keeps: at least one each where the budget allows, the rest by size.

    sizes: blocks per component. The rest is divided in proportion to what is left of each component, by largest
    remainder; ties, and a budget smaller than the number of components, are decided at random. The sum is `budget`.
    """
    if budget < len(sizes):
        shares = np.zeros(len(sizes), dtype=np.int64)
        shares[generator.choice(len(sizes), size=budget, replace=False)] = 1
        return shares
    spare, pool = budget - len(sizes), int(sizes.sum()) - len(sizes)
    if pool == 0:
        return np.ones(len(sizes), dtype=np.int64)
    whole, remainder = np.divmod((sizes - 1).astype(np.int64) * spare, pool)
    missing = spare - int(whole.sum())
    order = np.lexsort((generator.random(len(sizes)), -remainder))
    whole[order[:missing]] += 1
    return whole + 1


def conncomp(image: np.ndarray, settings: PruneSettings, block: int, budget: int | None = None) -> Selection:
    """Connected components as in the paper's published code (its ConnCompSelector, commit a870e31).

    Each 4-neighbour component of blocks within the threshold of each other is thinned at random by the ratio that
    pred2d omits, at least one block kept; blocks are then removed, or put back, at random until the budget is met: a
    component may lose all. Omitted blocks have source -1.
    """
    grid = (image.shape[0] // block, image.shape[1] // block)
    budget = budget or block_budget(image, settings, block)
    component, sizes = _components(image, settings, block)
    generator = _generator(image, settings.seed)
    num_skipped = np.rint(sizes * (1.0 - budget / component.size)).astype(np.int64)
    shares = np.where(sizes == 1, 1, np.maximum(1, sizes - num_skipped))
    is_kept = np.zeros(component.size, dtype=bool)
    is_kept[_random_members(component, sizes, shares, generator)] = True
    surplus = int(is_kept.sum()) - budget
    pool = np.flatnonzero(is_kept if surplus > 0 else ~is_kept)
    is_kept[generator.choice(pool, size=abs(surplus), replace=False)] ^= True
    return _selection(np.flatnonzero(is_kept), grid)


def conncomp_cover(image: np.ndarray, settings: PruneSettings, block: int, budget: int | None = None) -> Selection:
    """A stronger baseline than the paper's: a random subset of each component of identical blocks that never loses one.

    At least one block per component where the budget allows, the rest in proportion. Omitted blocks have source -1.
    """
    grid = (image.shape[0] // block, image.shape[1] // block)
    budget = budget or block_budget(image, settings, block)
    component, sizes = _components(image, dataclasses.replace(settings, threshold=0.0), block)
    generator = _generator(image, settings.seed)
    shares = component_shares(sizes, budget, generator)
    return _selection(_random_members(component, sizes, shares, generator), grid)


def _components(image: np.ndarray, settings: PruneSettings, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Component of every block (rows * cols,) and blocks per component, neighbours joined within the threshold."""
    grid = (image.shape[0] // block, image.shape[1] // block)
    left, above = np.empty(grid, dtype=np.bool_), np.empty(grid, dtype=np.bool_)
    metric, limit = integer_limit(settings.metric, settings.threshold, block)
    if metric == kernels.EXACT:
        kernels.equal_neighbours(pixel_bytes(image), block, left, above)
    else:
        kernels.near_neighbours(pixel_bytes(image), block, metric, limit, left, above)
    label = np.empty(grid, dtype=np.int64)
    kernels.label_components(left, above, label)
    _, component, sizes = np.unique(label.ravel(), return_inverse=True, return_counts=True)
    return component, sizes


def _random_members(
    component: np.ndarray, sizes: np.ndarray, shares: np.ndarray, generator: np.random.Generator
) -> np.ndarray:
    """Flat indices of `shares[i]` blocks of each component i, at random."""
    order: np.ndarray = np.lexsort((generator.random(component.size), component))
    place = np.arange(component.size) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    members: np.ndarray = order[place < np.repeat(shares, sizes)]
    return members


def resize(image: np.ndarray, settings: PruneSettings, block: int, budget: int | None = None) -> Selection:
    """Listed for its name: it scales the image (`image.prune_pixels` does) and has no keep mask: raises ValueError."""
    raise ValueError(
        "prune.strategy: 'resize' scales the image and has no keep mask; use pixelprune.images.image.prune_pixels, or "
        "scale to pixelprune.selection.baselines.budget_size(height, width, block_budget(image, settings)) and select "
        "with 'none'"
    )


AT_BUDGET = {"random": random, "conncomp": conncomp, "conncomp_cover": conncomp_cover, "resize": resize}
"""The baselines, by name: what they keep is a matter of how many blocks, not of what is predicted."""
