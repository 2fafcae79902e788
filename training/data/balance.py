"""One optimizer step's samples into packs of equal cost: the compiled core of the plan.

The ranks of a micro-step wait for its slowest pack, so a step takes the sum over micro-steps of the largest pack's
cost. Packs are bins with two caps (tokens, patches) and a target height (cost); R = ranks, M = micro-steps, R * M bins.

1. M is the smallest number of micro-steps whose bins hold everything.
2. Heights: equal, unless single samples exceed the mean; then the first micro-step is as high as the largest sample,
   the next as high as the largest sample that may fall into it, and so on, and what remains is shared.
3. Longest processing time first (Graham 1969): samples in falling cost, each into the bin with the most room left below
   its height among those whose caps allow it.
4. Moves and swaps out of the highest pack of each micro-step, as long as they lower it.
5. Bins sorted by cost, R similar ones to a micro-step; the costliest micro-step first, so that a run that would exceed
   the memory does so at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numba
import numpy as np

from pixelprune.attention.prefixes import LEAST_SAVING

NO_BIN = -1
SLACK = 1e-9
EVEN_ENOUGH = 2e-3
"""Improvement stops when the highest pack of a micro-step is this close to their mean."""


class Caps(NamedTuple):
    """Ranks, and what a pack may hold at most."""

    world_size: int
    max_tokens: int
    max_patches: int


class PrefixColumns(NamedTuple):
    """Which samples begin alike, one row per sample, and what all but one of those in a pack do not compute.

    group: int64 (S,), equal numbers share a prefix; tokens, patches: int64 (S,) and cost: float64 (S,), of the prefix.
    Where the vision tower alone is shared, no tokens, and patches and cost of the picture.
    """

    group: np.ndarray
    tokens: np.ndarray
    patches: np.ndarray
    cost: np.ndarray

    def of(self, rows: np.ndarray) -> PrefixColumns:
        return PrefixColumns(*(column[rows] for column in self))


def pack_step(
    tokens: np.ndarray, patches: np.ndarray, cost: np.ndarray, *, world_size: int, max_tokens: int, max_patches: int
) -> tuple[np.ndarray, int]:
    """Bin of every sample of a step (int32 (S,), bin = micro_step * world_size + rank) and the number of micro-steps.

    tokens, patches int64 (S,), cost float64 (S,). Deterministic. Raises ValueError when one sample exceeds a cap.
    """
    if tokens.max() > max_tokens or patches.max() > max_patches:
        raise ValueError(
            f"a sample of {tokens.max()} tokens and {patches.max()} patches at most does not fit into packs of "
            f"{max_tokens} tokens and {max_patches} patches (data.pack_tokens, data.pack_patches)"
        )
    order = np.argsort(-cost, kind="stable")
    fewest = max(-(-int(tokens.sum()) // max_tokens), -(-int(patches.sum()) // max_patches), 1)
    num_micro = -(-fewest // world_size)
    while True:
        bins = _best_assignment(order, tokens, patches, cost, world_size, num_micro, max_tokens, max_patches)
        if bins[0] != NO_BIN:
            return bins, num_micro
        num_micro += 1


def pack_groups(
    tokens: np.ndarray, patches: np.ndarray, cost: np.ndarray, prefixes: PrefixColumns, caps: Caps
) -> tuple[np.ndarray, int, np.ndarray]:
    """As `pack_step` for samples of which those of one group compute their prefix once in a pack.

    Also returns the packs' costs, float64 (micro-steps, ranks). A group is cut into pieces, each paying its prefix:
    into one, into as many as its cost holds shares of a rank's mean, and finer, down to single samples; what takes the
    least time is taken, so that it is never longer than with samples apart.
    """
    group, prefix_tokens, prefix_patches, prefix_cost = prefixes
    members = [np.flatnonzero(group == number) for number in dict.fromkeys(group.tolist())]

    def weigh(piece: np.ndarray) -> tuple[int, int, float]:
        """Tokens, patches and cost of a piece, shared where the pack will share it."""
        n, first = len(piece) - 1, piece[0]
        whole = int(tokens[piece].sum())
        if 0 < n * prefix_tokens[first] < LEAST_SAVING * whole:
            n = 0
        return (
            whole - n * int(prefix_tokens[first]),
            int(patches[piece].sum()) - n * int(prefix_patches[first]),
            float(cost[piece].sum()) - n * float(prefix_cost[first]),
        )

    weighed = [weigh(rows) for rows in members]
    mean = sum(one for *_, one in weighed) / caps.world_size
    best: tuple[float, np.ndarray, int, np.ndarray] | None = None
    for target in (np.inf, mean, mean / 2, mean / 4, 0.0):
        pieces = [
            piece
            for rows, sums in zip(members, weighed, strict=True)
            for piece in _pieces(rows, sums, weigh, target, caps)
        ]
        columns = [np.array(column) for column in zip(*map(weigh, pieces), strict=True)]
        bins, num_micro = pack_step(*columns, **caps._asdict())
        loads = np.bincount(bins, weights=columns[2], minlength=num_micro * caps.world_size).reshape(num_micro, -1)
        height = float(loads.max(axis=1).sum())
        if best is None or height < best[0] * (1 - SLACK):
            of_sample = np.empty(len(tokens), dtype=np.int32)
            for piece, number in zip(pieces, bins, strict=True):
                of_sample[piece] = number
            best = height, of_sample, num_micro, loads
    assert best is not None
    return best[1:]


def _pieces(
    rows: np.ndarray,
    sums: tuple[int, int, float],
    weigh: Callable[[np.ndarray], tuple[int, int, float]],
    target: float,
    caps: Caps,
) -> list[np.ndarray]:
    """A group in as few even pieces as are below the target cost and the caps, or as single samples."""
    for num in range(1, len(rows)):
        if target and sums[2] > num * target:  # pieces pay their prefix, so that there are at least so many
            continue
        if not target:
            break
        pieces = np.array_split(rows, num)
        weights = [weigh(piece) for piece in pieces]
        if all(t <= caps.max_tokens and p <= caps.max_patches and (c <= target or num > 1) for t, p, c in weights):
            return pieces
    return [rows[i : i + 1] for i in range(len(rows))]


def waste_bound(cost: np.ndarray, world_size: int) -> float:
    """Least sum over micro-steps of the largest pack's cost that any plan of this step can reach.

    The mean per rank; or, by the pigeonhole principle, k + 1 of the k R + 1 costliest samples on one rank, for every k
    (k = 0: the costliest sample cannot be split).
    """
    falling = np.sort(cost)[::-1]
    bound = float(cost.sum()) / world_size
    for k in range((len(cost) - 1) // world_size + 1):
        last = k * world_size
        bound = max(bound, float(falling[last - k : last + 1].sum()))
    return bound


def _best_assignment(order, tokens, patches, cost, world_size, num_micro, max_tokens, max_patches) -> np.ndarray:
    best, best_height = np.full(len(order), NO_BIN, dtype=np.int32), np.inf
    targets = _heights(cost[order], world_size, num_micro)
    candidates = [targets] if np.all(targets == targets[0]) else [targets, np.full(num_micro, targets.mean())]
    for heights in candidates:
        bins = _fill(order, tokens, patches, cost, np.repeat(heights, world_size), max_tokens, max_patches)
        if bins[0] == NO_BIN:
            continue
        bins, height = _group(bins, cost, world_size, num_micro)
        if height > best_height * (1 - SLACK):
            continue
        best, best_height = bins, height
    if best[0] == NO_BIN:
        return best
    _improve(best, tokens, patches, cost, world_size, num_micro, max_tokens, max_patches)
    return _group(best, cost, world_size, num_micro)[0]


def _heights(falling: np.ndarray, world_size: int, num_micro: int) -> np.ndarray:
    """Target cost of the packs of every micro-step, for sample costs in falling order."""
    heights = np.empty(num_micro)
    left = float(falling.sum())
    for m in range(num_micro):
        mean = max(left, 0.0) / (world_size * (num_micro - m))
        largest = falling[m * world_size] if m * world_size < len(falling) else 0.0
        if largest <= mean:
            heights[m:] = mean
            break
        heights[m] = largest
        left -= world_size * largest
    return heights


def _group(bins: np.ndarray, cost: np.ndarray, world_size: int, num_micro: int) -> tuple[np.ndarray, float]:
    """Renumber bins so that each micro-step holds packs of similar cost; also the sum of the micro-steps' largest."""
    loads = np.bincount(bins, weights=cost, minlength=world_size * num_micro)
    falling = np.argsort(-loads, kind="stable").reshape(num_micro, world_size)
    height = float(loads[falling[:, 0]].sum())
    # Every other micro-step counts its ranks backwards, so that no rank always gets the largest pack.
    falling[1::2] = falling[1::2, ::-1].copy()
    number = np.empty(world_size * num_micro, dtype=np.int32)
    number[falling.ravel()] = np.arange(world_size * num_micro, dtype=np.int32)
    return number[bins], height


@numba.njit(cache=True)
def _fill(order, tokens, patches, cost, heights, max_tokens, max_patches):
    """Every sample into the feasible bin with the most room; bins[:] = NO_BIN when one finds none.

    A tree over the bins holds the most room, free tokens and free patches below every node, so that a bin is found in
    a few steps of a branch-and-bound search instead of a scan.
    """
    num_bins = len(heights)
    size = 1
    while size < num_bins:
        size *= 2
    room = np.full(2 * size, -np.inf)
    free_tokens = np.full(2 * size, -1, dtype=np.int64)
    free_patches = np.full(2 * size, -1, dtype=np.int64)
    room[size : size + num_bins] = heights
    free_tokens[size : size + num_bins] = max_tokens
    free_patches[size : size + num_bins] = max_patches
    for node in range(size - 1, 0, -1):
        room[node] = max(room[2 * node], room[2 * node + 1])
        free_tokens[node] = max(free_tokens[2 * node], free_tokens[2 * node + 1])
        free_patches[node] = max(free_patches[2 * node], free_patches[2 * node + 1])
    bins = np.full(len(order), NO_BIN, dtype=np.int32)
    stack = np.empty(128, dtype=np.int64)
    for i in order:
        best, best_room = -1, -np.inf
        stack[0], depth = 1, 1
        while depth > 0:
            depth -= 1
            node = stack[depth]
            if room[node] <= best_room or free_tokens[node] < tokens[i] or free_patches[node] < patches[i]:
                continue
            if node >= size:
                best, best_room = node, room[node]
                continue
            roomier = 2 * node if room[2 * node] >= room[2 * node + 1] else 2 * node + 1
            stack[depth], stack[depth + 1] = roomier ^ 1, roomier
            depth += 2
        if best < 0:
            bins[:] = NO_BIN
            return bins
        bins[i] = best - size
        room[best] -= cost[i]
        free_tokens[best] -= tokens[i]
        free_patches[best] -= patches[i]
        node = best // 2
        while node > 0:
            room[node] = max(room[2 * node], room[2 * node + 1])
            free_tokens[node] = max(free_tokens[2 * node], free_tokens[2 * node + 1])
            free_patches[node] = max(free_patches[2 * node], free_patches[2 * node + 1])
            node //= 2
    return bins


@numba.njit(cache=True)
def _improve(bins, tokens, patches, cost, world_size, num_micro, max_tokens, max_patches):
    """Lower the highest pack of each micro-step by moving one of its samples or swapping it for a cheaper one.

    `bins` is grouped (see `_group`) and changed in place. Each accepted change lowers the highest of the two packs
    involved, so the search ends; `rounds` bounds its time.
    """
    rounds = 4 * world_size
    num_bins = world_size * num_micro
    load = np.zeros(num_bins)
    used_tokens = np.zeros(num_bins, dtype=np.int64)
    used_patches = np.zeros(num_bins, dtype=np.int64)
    for i in range(len(bins)):
        load[bins[i]] += cost[i]
        used_tokens[bins[i]] += tokens[i]
        used_patches[bins[i]] += patches[i]
    for m in range(num_micro):
        first, last = m * world_size, (m + 1) * world_size
        even_enough = load[first:last].mean() * (1 + EVEN_ENOUGH)
        members = np.flatnonzero((bins >= first) & (bins < last))
        for _ in range(rounds):
            high = first
            low = first
            for b in range(first, last):
                if load[b] > load[high]:
                    high = b
                if load[b] < load[low]:
                    low = b
            if load[high] <= even_enough:
                break
            best_peak, best_i, best_j, best_bin = load[high] * (1 - 1e-4), -1, -1, -1
            for i in members:  # type: ignore[assignment]
                if bins[i] != high:
                    continue
                peak = max(load[high] - cost[i], load[low] + cost[i])
                fits = used_tokens[low] + tokens[i] <= max_tokens and used_patches[low] + patches[i] <= max_patches
                if fits and peak < best_peak:
                    best_peak, best_i, best_j, best_bin = peak, int(i), -1, low
                for j in members:
                    b = bins[j]
                    if b == high or cost[j] >= cost[i]:
                        continue
                    moved = cost[i] - cost[j]
                    peak = max(load[high] - moved, load[b] + moved)
                    if peak >= best_peak:
                        continue
                    more_t, more_p = tokens[i] - tokens[j], patches[i] - patches[j]
                    fits = used_tokens[b] + more_t <= max_tokens and used_patches[b] + more_p <= max_patches
                    fits = fits and used_tokens[high] - more_t <= max_tokens
                    if fits and used_patches[high] - more_p <= max_patches:
                        best_peak, best_i, best_j, best_bin = peak, int(i), int(j), int(b)
            if best_i < 0:
                break
            for k, sign in ((best_i, 1), (best_j, -1)):
                if k < 0:
                    continue
                load[best_bin] += sign * cost[k]
                load[high] -= sign * cost[k]
                used_tokens[best_bin] += sign * tokens[k]
                used_tokens[high] -= sign * tokens[k]
                used_patches[best_bin] += sign * patches[k]
                used_patches[high] -= sign * patches[k]
                bins[k] = best_bin if sign == 1 else high
