"""Packs against brute force and against the caps; the bound against brute force too."""

import itertools

import numpy as np
import pytest

from training.data.balance import pack_step, waste_bound


def random_step(rng, num, spread=1.0):
    tokens = rng.integers(1, 60, num)
    patches = rng.integers(0, 120, num)
    return tokens, patches, np.exp(spread * rng.standard_normal(num))


def height(bins, cost, num_micro, world_size):
    loads = np.zeros(num_micro * world_size)
    for b, c in zip(bins, cost, strict=True):
        loads[b] += c
    return loads.reshape(num_micro, world_size).max(axis=1).sum()


def best_height(tokens, patches, cost, world_size, num_micro, max_tokens, max_patches):
    """All assignments, one by one."""
    num_bins, best = world_size * num_micro, np.inf
    for bins in itertools.product(range(num_bins), repeat=len(cost)):
        if all(
            sum(tokens[i] for i in range(len(cost)) if bins[i] == b) <= max_tokens
            and sum(patches[i] for i in range(len(cost)) if bins[i] == b) <= max_patches
            for b in range(num_bins)
        ):
            best = min(best, height(bins, cost, num_micro, world_size))
    return best


@pytest.mark.parametrize("seed", range(60))
def test_caps_hold_and_every_sample_has_one_bin(seed):
    rng = np.random.default_rng(seed)
    num, world_size = int(rng.integers(1, 300)), int(rng.integers(1, 20))
    tokens, patches, cost = random_step(rng, num, spread=rng.uniform(0, 2))
    caps = int(rng.integers(60, 400)), int(rng.integers(120, 800))
    bins, num_micro = pack_step(tokens, patches, cost, world_size=world_size, max_tokens=caps[0], max_patches=caps[1])
    assert bins.shape == (num,)
    assert bins.min() >= 0
    assert bins.max() < num_micro * world_size
    assert np.bincount(bins, weights=tokens).max() <= caps[0]
    assert np.bincount(bins, weights=patches).max() <= caps[1]
    again, _ = pack_step(tokens, patches, cost, world_size=world_size, max_tokens=caps[0], max_patches=caps[1])
    assert (bins == again).all()
    loads = np.bincount(bins, weights=cost, minlength=num_micro * world_size).reshape(num_micro, world_size)
    assert (np.diff(loads.max(axis=1)) <= 1e-9).all(), "the costliest micro-step comes first"


@pytest.mark.parametrize("seed", range(8))
def test_close_to_brute_force_and_never_below_the_bound(seed):
    rng = np.random.default_rng(seed)
    tokens, patches, cost = random_step(rng, 7)
    bins, num_micro = pack_step(tokens, patches, cost, world_size=2, max_tokens=1000, max_patches=1000)
    assert num_micro == 1
    best = best_height(tokens, patches, cost, 2, num_micro, 1000, 1000)
    assert waste_bound(cost, 2) <= best * (1 + 1e-9)
    assert height(bins, cost, num_micro, 2) <= 1.05 * best


@pytest.mark.parametrize("seed", range(4))
def test_under_tight_caps_close_to_brute_force(seed):
    rng = np.random.default_rng(seed)
    tokens, patches, cost = random_step(rng, 6)
    bins, num_micro = pack_step(tokens, patches, cost, world_size=2, max_tokens=80, max_patches=200)
    best = best_height(tokens, patches, cost, 2, num_micro, 80, 200)
    assert np.isfinite(best)
    assert height(bins, cost, num_micro, 2) <= 1.1 * best
    if num_micro > 1:
        fewer = best_height(tokens, patches, cost, 2, num_micro - 1, 80, 200)
        assert fewer == np.inf, "one micro-step less would have held everything"


def test_bound_counts_what_cannot_be_split():
    assert waste_bound(np.array([10.0, 1, 1]), 4) == 10
    assert waste_bound(np.array([6.0, 6, 6, 0.1]), 2) == 12
    assert waste_bound(np.ones(8), 4) == 2


def test_fewer_samples_than_ranks_leave_ranks_empty():
    bins, num_micro = pack_step(
        np.array([5, 5]), np.array([4, 4]), np.array([1.0, 2.0]), world_size=8, max_tokens=10, max_patches=10
    )
    assert num_micro == 1
    assert len(set(bins.tolist())) == 2


def test_a_sample_above_a_cap_is_refused():
    with pytest.raises(ValueError, match=r"data\.pack_tokens"):
        pack_step(np.array([11]), np.array([0]), np.ones(1), world_size=1, max_tokens=10, max_patches=10)


def test_large_samples_share_a_micro_step():
    """Two samples far above the mean: together in one micro-step they cost their height once."""
    cost = np.array([100.0, 100.0] + [1.0] * 60)
    tokens = np.array([50, 50] + [10] * 60)
    bins, num_micro = pack_step(tokens, tokens, cost, world_size=2, max_tokens=100, max_patches=100)
    assert num_micro > 1
    assert bins[0] // 2 == bins[1] // 2
