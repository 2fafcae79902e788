"""The baselines meet PixelPrune's budget exactly and do what their names say."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pixelprune.selection import select
from pixelprune.selection.baselines import block_budget, budget_size, component_shares
from pixelprune.settings import PruneSettings
from tests.pixelprune.selection_reference import mosaic, page


def reference_components(image: np.ndarray, block: int) -> np.ndarray:
    """Component number of every block by flood fill over pixel-identical 4-neighbours."""
    rows, cols = image.shape[0] // block, image.shape[1] // block
    tiles = image.reshape(rows, block, cols, block, 3).swapaxes(1, 2)
    number = np.full((rows, cols), -1)
    count = 0
    for start in np.ndindex(rows, cols):
        if number[start] >= 0:
            continue
        queue = [start]
        number[start] = count
        while queue:
            r, c = queue.pop()
            for y, x in ((r - 1, c), (r + 1, c), (r, c - 1), (r, c + 1)):
                inside = 0 <= y < rows and 0 <= x < cols
                if inside and number[y, x] < 0 and np.array_equal(tiles[r, c], tiles[y, x]):
                    number[y, x] = count
                    queue.append((y, x))
        count += 1
    return number


@settings(max_examples=120, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    grid=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    num_tiles=st.integers(1, 4),
    noise=st.sampled_from([0, 0, 2]),
    strategy=st.sampled_from(["random", "conncomp", "conncomp_cover"]),
    metric=st.sampled_from(["max", "mae"]),
    threshold=st.sampled_from([0.0, 0.02, 0.1]),
)
def test_budget_is_met_exactly(seed, grid, num_tiles, noise, strategy, metric, threshold) -> None:
    image = mosaic(np.random.default_rng(seed), *grid, 4, num_tiles, 3, noise)
    budget = select(image, metric=metric, threshold=threshold, block=4).num_kept
    got = select(image, strategy=strategy, metric=metric, threshold=threshold, seed=seed, block=4)
    assert got.num_kept == budget
    assert got.keep.shape == grid
    np.testing.assert_array_equal(got.source, np.where(got.keep, np.arange(got.keep.size).reshape(grid), -1))
    if strategy == "conncomp_cover":
        number = reference_components(image, 4)
        kept, sizes = np.bincount(number[got.keep], minlength=number.max() + 1), np.bincount(number.ravel())
        assert (kept <= sizes).all()
        if budget >= len(sizes):
            # One each, and the rest in proportion to what remains: within one block of the exact share.
            exact = 1 + (sizes - 1) * (budget - len(sizes)) / max(1, number.size - len(sizes))
            assert (kept >= 1).all()
            assert (np.abs(kept - exact) < 1).all()
        else:
            assert kept.max() == 1
    if threshold == 0 and strategy == "conncomp_cover":
        # Proposition 1 leaves one kept block in each component, so the budget always reaches all of them.
        assert budget >= number.max() + 1


def near_components(image: np.ndarray, block: int, metric: str, threshold: float) -> np.ndarray:
    """Component number of every block by flood fill over 4-neighbours within the threshold."""
    rows, cols = image.shape[0] // block, image.shape[1] // block
    tiles = image.reshape(rows, block, cols, block, 3).swapaxes(1, 2).reshape(rows, cols, -1).astype(int)
    measure = np.max if metric == "max" else np.mean
    number = np.full((rows, cols), -1)
    for count, start in enumerate(np.ndindex(rows, cols)):
        queue = [start] if number[start] < 0 else []
        while queue:
            r, c = queue.pop()
            number[r, c] = count
            for y, x in ((r - 1, c), (r + 1, c), (r, c - 1), (r, c + 1)):
                inside = 0 <= y < rows and 0 <= x < cols
                if inside and number[y, x] < 0 and measure(abs(tiles[r, c] - tiles[y, x])) / 255 <= threshold:
                    queue.append((y, x))
    return np.unique(number, return_inverse=True)[1].reshape(rows, cols)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    grid=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    noise=st.sampled_from([0, 2]),
    metric=st.sampled_from(["max", "mae"]),
    threshold=st.sampled_from([0.0, 0.02, 0.1]),
)
def test_conncomp_is_the_published_rule(seed, grid, noise, metric, threshold) -> None:
    """Thinned by the ratio, one at least, then only removed or only added: no component crosses its share the wrong
    way, and the differences add up to what was missing."""
    image = mosaic(np.random.default_rng(seed), *grid, 4, 3, 3, noise)
    budget = select(image, metric=metric, threshold=threshold, block=4).num_kept
    got = select(image, strategy="conncomp", metric=metric, threshold=threshold, seed=seed, block=4)
    number = near_components(image, 4, metric, threshold)
    sizes = np.bincount(number.ravel())
    ratio = 1.0 - budget / number.size
    shares = np.array([1 if size == 1 else max(1, size - round(size * ratio)) for size in sizes.tolist()])
    difference = np.bincount(number[got.keep], minlength=len(sizes)) - shares
    assert difference.sum() == budget - shares.sum()
    assert (difference <= 0).all() if budget <= shares.sum() else (difference >= 0).all()


def test_the_published_rule_loses_lone_blocks_and_the_covering_one_does_not() -> None:
    image = page(320, 640)
    number = reference_components(image, 32)
    lone = np.bincount(number.ravel())[number] == 1
    kept = [select(image, strategy="conncomp", seed=seed).keep[lone].mean() for seed in range(20)]
    assert lone.sum() > 10
    assert np.mean(kept) < 1
    assert select(image, strategy="conncomp_cover").keep[lone].all()


@pytest.mark.parametrize("strategy", ["random", "conncomp", "conncomp_cover"])
def test_choice_depends_on_seed_and_pixels_only(strategy: str) -> None:
    image = page(320, 640)
    first = select(image, strategy=strategy, seed=3)
    np.testing.assert_array_equal(first.keep, select(image.copy(), strategy=strategy, seed=3).keep)
    assert (first.keep != select(image, strategy=strategy, seed=4).keep).any()
    darker = (image // 2 * 2) // 2
    assert select(darker).num_kept == first.num_kept
    assert (first.keep != select(darker, strategy=strategy, seed=3).keep).any()


def test_random_keeps_every_place_equally_often() -> None:
    image = page(128, 256)
    budget = block_budget(image, PruneSettings())
    counts = sum(select(image, strategy="random", seed=seed).keep.astype(int) for seed in range(2000))
    expected = 2000 * budget / image.size * 3072
    assert 0 < budget < 32
    assert np.abs(counts - expected).max() < 6 * np.sqrt(expected)


def test_shares_never_exceed_a_component() -> None:
    generator = np.random.default_rng(0)
    for _ in range(300):
        sizes = generator.integers(1, 30, size=int(generator.integers(1, 12)))
        for budget in range(1, int(sizes.sum()) + 1):
            shares = component_shares(sizes, budget, generator)
            assert shares.sum() == budget
            assert (shares <= sizes).all()
            assert (shares >= (1 if budget >= len(sizes) else 0)).all()


def brute_force_size(height: int, width: int, num_blocks: int, factor: int) -> tuple[int, int]:
    """All scales at which either side changes, tried from the largest down, in exact fractions."""
    from fractions import Fraction

    scales = {Fraction(1)}
    for side in (height, width):
        scales |= {Fraction((2 * n - 1) * factor, 2 * side) for n in range(1, side // factor + 2)}
    # Just below a scale where a side changes counts as well: those are the midpoints between neighbours.
    ordered = sorted(scale for scale in scales if scale <= 1)
    middles = [(low + high) / 2 for low, high in zip([Fraction(0), *ordered], ordered, strict=False)]
    for scale in sorted([*ordered, *middles], reverse=True):
        rows = max(1, int(height * scale / factor + Fraction(1, 2)))
        cols = max(1, int(width * scale / factor + Fraction(1, 2)))
        if rows * cols <= num_blocks:
            return rows * factor, cols * factor
    raise AssertionError("one block always fits")


@settings(max_examples=300, deadline=None)
@given(
    height=st.integers(1, 700),
    width=st.integers(1, 700),
    num_blocks=st.integers(1, 500),
    factor=st.sampled_from([1, 28, 32]).filter(lambda factor: factor > 1),
)
def test_resize_budget_is_the_largest_that_fits(height: int, width: int, num_blocks: int, factor: int) -> None:
    assert budget_size(height, width, num_blocks, factor) == brute_force_size(height, width, num_blocks, factor)


def test_resize_budget_keeps_the_shape() -> None:
    assert budget_size(1088, 1920, 34 * 60) == (1088, 1920)
    height, width = budget_size(1088, 1920, 510)
    assert (height, width) == (544, 960)
    assert budget_size(32, 6400, 7) == (32, 224)
    assert budget_size(6400, 64, 1) == (32, 32)


def test_wrong_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one block, got 0"):
        budget_size(64, 64, 0)
    with pytest.raises(ValueError, match="at least 1x1"):
        budget_size(0, 64, 3)
    with pytest.raises(ValueError, match=r"no keep mask.*budget_size"):
        select(page(), strategy="resize")
