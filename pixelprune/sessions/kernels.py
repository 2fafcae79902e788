"""Compiled kernels of prediction in time: blocks of two images compared in place, and the rule `change`.

Layout as in `pixelprune.selection.kernels`: an image is one flat array of bytes, a block is addressed by the offset of
its first byte. numba's cache on disk notices changes of one file only, so nothing compiled here calls compiled code
elsewhere.
"""

from __future__ import annotations

import numpy as np
from numba import njit

_BAND = 8


@njit(nogil=True, cache=True)
def same_blocks(pixels, reference, block, row_len, same):
    """Set `same` (rows, cols) True where a block equals the one at its place in `reference`, read in memory order.

    pixels, reference: flat, of any unsigned integers, `row_len` of which are one row of a block: words of eight bytes
    are compared five times as fast as bytes.
    """
    rows, cols = same.shape
    stride = row_len * cols
    for r in range(rows):
        for c in range(cols):
            same[r, c] = True
        num_open = cols
        for top in range(0, block, _BAND):
            if num_open == 0:
                break
            num_open = 0
            for c in range(cols):
                if same[r, c]:
                    start = (r * block + top) * stride + c * row_len
                    equal = _band_equal(pixels, start, reference, start, stride, min(_BAND, block - top), row_len)
                    same[r, c] = equal
                    num_open += equal


@njit(nogil=True, cache=True)
def equal_after(pixels, block, row_len, same, left_before, above_before, left, above):
    """Set `left` and `above` (rows, cols) True where a block equals its left neighbour, the one above it.

    left_before, above_before: the same of the reference. Of two blocks of which both are as there, nothing changed; one
    that is as there no longer equals one that is not, if it did. With X the block, A left, B above, C above-left, X = B
    is looked up only where the three equalities known by then (X = A, A = C, C = B) do not decide it.
    pixels, row_len: as in `same_blocks`.
    """
    rows, cols = same.shape
    stride = row_len * cols
    is_open = np.empty(cols, np.bool_)
    for r in range(rows):
        num_open = 0
        left[r, 0], is_open[0] = False, False
        for c in range(1, cols):
            known = (same[r, c] and same[r, c - 1]) or (left_before[r, c] and same[r, c] != same[r, c - 1])
            is_open[c] = not known
            left[r, c] = left_before[r, c] and same[r, c] and same[r, c - 1] if known else True
            num_open += not known
        for top in range(0, block, _BAND):
            if num_open == 0:
                break
            num_open = 0
            for c in range(1, cols):
                if is_open[c]:
                    p = (r * block + top) * stride + c * row_len
                    equal = _band_equal(pixels, p, pixels, p - row_len, stride, min(_BAND, block - top), row_len)
                    left[r, c], is_open[c] = equal, equal
                    num_open += equal
        for c in range(cols):
            if r == 0:
                above[r, c] = False
                continue
            left_is_corner, corner_is_above = c > 0 and above[r, c - 1], c > 0 and left[r - 1, c]
            if same[r, c] and same[r - 1, c]:
                above[r, c] = above_before[r, c]
            elif above_before[r, c] and same[r, c] != same[r - 1, c]:
                above[r, c] = False
            elif left[r, c] and (left_is_corner or corner_is_above):
                above[r, c] = left_is_corner and corner_is_above
            elif left_is_corner and corner_is_above:
                above[r, c] = False
            else:
                p = r * block * stride + c * row_len
                above[r, c] = _block_equal(pixels, p, p - block * stride, stride, block, row_len)


@njit(nogil=True, cache=True)
def _band_equal(pixels, p, others, q, stride, num_rows, row_len):
    """Whether `num_rows` rows of the blocks at p in `pixels` and at q in `others` are equal: all of them are read."""
    differs = pixels[p] ^ others[q]
    for i in range(num_rows):
        at, beside = p + i * stride, q + i * stride
        ours, theirs = pixels[at : at + row_len], others[beside : beside + row_len]
        for k in range(row_len):
            differs |= ours[k] ^ theirs[k]
    return differs == 0


@njit(nogil=True, cache=True)
def _block_equal(pixels, p, q, stride, block, row_len):
    """Whether the blocks at p and at q are equal; the first row that differs ends it."""
    num_equal = 0
    while num_equal < block and _band_equal(pixels, p, pixels, q, stride, 1, row_len):
        p, q, num_equal = p + stride, q + stride, num_equal + 1
    return num_equal == block


@njit(nogil=True, cache=True)
def pred2d_of(left, above, number, keep, origin):
    """pred2d at threshold 0, of the equalities alone: fills keep and origin as `change_exact` does."""
    rows, cols = keep.shape
    for r in range(rows):
        for c in range(cols):
            use_above = r > 0 and (c == 0 or (above[r, c - 1] and not left[r - 1, c]))
            omitted = above[r, c] if use_above else left[r, c]
            keep[r, c] = not omitted
            origin[r, c, 0] = number
            if not omitted:
                origin[r, c, 1] = r * cols + c
            elif use_above:
                origin[r, c, 1] = origin[r - 1, c, 1]
            else:
                origin[r, c, 1] = origin[r, c - 1, 1]


@njit(nogil=True, cache=True)
def beside_exact(pixels, reference, block, row_len, before, before_origin, number, keep_replaced, equal, keep, origin):
    """One image beside its reference at threshold 0; returns whether pred2d keeps no more blocks, and is taken.

    pixels, reference, row_len: as in `same_blocks`. before, equal: (2, rows, cols), `left` and `above` of the reference
    and of the image, as in `equal_after`. before_origin: (rows, cols, 2) `origin` of the reference. number: of this
    image. keep_replaced: also keep what changed where pred2d keeps a block of the reference.
    Fills equal, keep (rows, cols) and origin (rows, cols, 2): image and flat index of the kept block that stands there.
    One call, since a call of compiled code from outside takes as long as the rule itself.
    """
    rows, cols = keep.shape
    same, forced = np.empty((rows, cols), np.bool_), np.zeros((rows, cols), np.bool_)
    plain, plain_origin = np.empty((rows, cols), np.bool_), np.empty((rows, cols, 2), np.int32)
    same_blocks(pixels, reference, block, row_len, same)
    equal_after(pixels, block, row_len, same, before[0], before[1], equal[0], equal[1])
    if keep_replaced:
        pred2d_of(before[0], before[1], number, forced, plain_origin)
        forced &= ~same
    _change_exact(equal[0], equal[1], same, forced, number, before_origin, keep, origin)
    pred2d_of(equal[0], equal[1], number, plain, plain_origin)
    if plain.sum() > keep.sum():
        return False
    keep[:], origin[:] = plain, plain_origin
    return True


@njit(nogil=True, cache=True)
def _change_exact(left, above, same, forced, number, reference, keep, origin):
    """The rule at threshold 0, of the equalities alone.

    left, above: whether a block equals its left neighbour, the one above. same: ... the one at its place in the
    reference. forced: kept in any case. reference: `origin` of the reference; number, keep, origin: as above.
    """
    rows, cols = keep.shape
    told = np.zeros((rows, cols), np.bool_)  # changed since the reference, and where pred2d would expect it
    for r in range(rows):
        for c in range(cols):
            use_above = r > 0 and (c == 0 or (above[r, c - 1] and not left[r - 1, c]))
            expected = above[r, c] if use_above else left[r, c]
            spatial = (c > 0 and told[r, c - 1]) or (r > 0 and told[r - 1, c])
            spatial = spatial or (r > 0 and c > 0 and told[r - 1, c - 1])
            told[r, c] = expected and not same[r, c]
            omitted = expected if spatial else same[r, c]
            if (r == 0 and c == 0) or forced[r, c]:
                omitted = False
            keep[r, c] = not omitted
            if not omitted:
                origin[r, c, 0] = number
                origin[r, c, 1] = r * cols + c
            elif not spatial:
                origin[r, c, 0] = reference[r, c, 0]
                origin[r, c, 1] = reference[r, c, 1]
            elif use_above:
                origin[r, c, 0] = origin[r - 1, c, 0]
                origin[r, c, 1] = origin[r - 1, c, 1]
            else:
                origin[r, c, 0] = origin[r, c - 1, 0]
                origin[r, c, 1] = origin[r, c - 1, 1]


@njit(nogil=True, cache=True)
def _within(pixels, stride, p, q, block, is_max, limit):
    """Whether the blocks at offsets p and q differ by at most `limit`: in any byte, or in the sum of all."""
    if p == q:
        return True
    total = np.int64(0)
    for _ in range(block):
        largest = np.int64(0)
        row = np.int64(0)
        for k in range(3 * block):
            difference = abs(np.int64(pixels[p + k]) - np.int64(pixels[q + k]))
            largest = max(largest, difference)
            row += difference
        total += row
        if (largest if is_max else total) > limit:
            return False
        p += stride
        q += stride
    return True


@njit(nogil=True, cache=True)
def change_near(pixels, block, is_max, limit, forced, keep, at):
    """The rule above threshold 0, comparing with what the decoder has.

    pixels: the decoded reference, then the image, one under the other. forced: kept wherever they differ from the
    reference. Fills keep (rows, cols) and at (rows, cols): the byte offset of the block that stands there.
    """
    rows, cols = keep.shape
    row_len = 3 * block
    stride = row_len * cols
    size = rows * block * stride
    told = np.zeros((rows, cols), np.bool_)
    for r in range(rows):
        for c in range(cols):
            place = r * block * stride + c * row_len
            mine = size + place
            use_above = r > 0 and c == 0
            if r > 0 and c > 0:
                a, b, corner = at[r, c - 1], at[r - 1, c], at[r - 1, c - 1]
                use_above = _within(pixels, stride, corner, a, block, is_max, limit) and not _within(
                    pixels, stride, corner, b, block, is_max, limit
                )
            expected = np.int64(-1)
            if r > 0 or c > 0:
                expected = at[r - 1, c] if use_above else at[r, c - 1]
            spatial = (c > 0 and told[r, c - 1]) or (r > 0 and told[r - 1, c])
            spatial = spatial or (r > 0 and c > 0 and told[r - 1, c - 1])
            prediction = expected if spatial else place
            omitted = expected >= 0 and _within(pixels, stride, mine, prediction, block, is_max, limit)
            if omitted and forced[r, c]:
                omitted = _within(pixels, stride, mine, place, block, is_max, limit)
            keep[r, c] = not omitted
            at[r, c] = prediction if omitted else mine
            told[r, c] = (
                expected >= 0
                and _within(pixels, stride, at[r, c], expected, block, is_max, limit)
                and not _within(pixels, stride, at[r, c], place, block, is_max, limit)
            )


def compile_all() -> None:
    """Compile every kernel, or load it from the cache."""
    flags, keep = np.zeros((1, 2), np.bool_), np.empty((1, 2), np.bool_)
    equal, origin = np.zeros((2, 1, 2), np.bool_), np.zeros((1, 2, 2), np.int32)
    for dtype in (np.uint8, np.uint64):
        pixels = np.zeros(6, dtype)
        pixels.flags.writeable = False
        beside_exact(pixels, pixels, 1, 3, equal, origin, 0, False, equal.copy(), keep, origin.copy())
    pred2d_of(flags, flags, 0, keep, origin.copy())
    change_near(np.zeros(12, np.uint8), 1, True, 1, flags, keep, np.empty((1, 2), np.int64))
