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
                    differs = pixels[start] ^ reference[start]
                    for i in range(min(_BAND, block - top)):
                        p = start + i * stride
                        ours, theirs = pixels[p : p + row_len], reference[p : p + row_len]
                        for k in range(row_len):
                            differs |= ours[k] ^ theirs[k]
                    same[r, c] = differs == 0
                    num_open += differs == 0


@njit(nogil=True, cache=True)
def equal_after(pixels, block, row_len, same, left_before, above_before, left, above):
    """Set `left` and `above` (rows, cols) True where a block equals its left neighbour, the one above it.

    left_before, above_before: the same of the reference. Two blocks that are those of the reference need no look.
    pixels, row_len: as in `same_blocks`.
    """
    rows, cols = same.shape
    stride = row_len * cols
    for r in range(rows):
        for c in range(cols):
            p = r * block * stride + c * row_len
            left[r, c], above[r, c] = False, False
            if c > 0:
                known = same[r, c] and same[r, c - 1]
                left[r, c] = left_before[r, c] if known else _equal(pixels, stride, p, p - row_len, block, row_len)
            if r > 0:
                known = same[r, c] and same[r - 1, c]
                other = p - block * stride
                above[r, c] = above_before[r, c] if known else _equal(pixels, stride, p, other, block, row_len)


@njit(nogil=True, cache=True)
def _equal(pixels, stride, p, q, block, row_len):
    for _ in range(block):
        ours, theirs = pixels[p : p + row_len], pixels[q : q + row_len]
        differs = ours[0] ^ theirs[0]
        for k in range(row_len):
            differs |= ours[k] ^ theirs[k]
        if differs != 0:
            return False
        p += stride
        q += stride
    return True


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
def change_exact(left, above, same, forced, number, reference, keep, origin):
    """The rule at threshold 0, of the equalities alone.

    left, above: whether a block equals its left neighbour, the one above. same: ... the one at its place in the
    reference. forced: kept in any case. number: of this image. reference: (rows, cols, 2) `origin` of the reference.
    Fills keep (rows, cols) and origin (rows, cols, 2): image and flat index of the kept block that stands there.
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
    image = np.zeros(6, np.uint8)
    image.flags.writeable = False
    flags, keep = np.zeros((1, 2), np.bool_), np.empty((1, 2), np.bool_)
    origin = np.zeros((1, 2, 2), np.int32)
    same_blocks(image, image, 1, 3, keep)
    words = np.zeros(6, np.uint64)
    words.flags.writeable = False
    same_blocks(words, words, 1, 3, keep)
    for pixels in (image, words):
        equal_after(pixels, 1, 3, flags, flags, flags, keep, keep.copy())
    pred2d_of(flags, flags, 0, keep, origin.copy())
    change_exact(flags, flags, flags, flags, 0, origin, keep, origin.copy())
    change_near(np.zeros(12, np.uint8), 1, True, 1, flags, keep, np.empty((1, 2), np.int64))
