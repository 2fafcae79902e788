"""Compiled kernels: compare blocks of a uint8 image in place and follow the prediction rules.

Layout. An image (height, width, 3) is one flat array of bytes; a block is `block` rows of `row_len = 3 * block`
contiguous bytes, `stride` bytes apart, addressed by the offset of its first byte. Rows are compared 96 bytes at a time
(one row of a 32 x 32 block) in vector registers, and the first row that differs ends a comparison.

What is read. Equality with the left neighbour is found for a whole row of blocks at once, in bands of pixel rows, which
reads the image in memory order; further equalities follow from transitivity wherever they can, so that a page of flat
regions is read once. Above threshold 0 the same bits answer most omission tests (see `pred2d_near`).

All kernels release the GIL, take read-only arrays, and are cached on disk: beside this file or, where the install is
read-only, in numba's per-user cache (the NUMBA_CACHE_DIR variable moves it). numba notices changes of this file only,
so whatever compiled code calls stays in this file.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

EXACT, MAX, MAE = 0, 1, 2
"""Metric codes. EXACT is the metric of threshold 0, whichever of the two was named."""

_CHUNK = 96
_BAND = 8
_I8, _I32, _I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
_BYTES = ir.VectorType(_I8, 32)
_WORDS = ir.VectorType(_I64, 4)


def _load_chunk(context, builder, array_type, array, offset, lanes: ir.VectorType) -> list:
    """Three 32-byte vectors from byte `offset` of `array`; no alignment is assumed."""
    data = context.make_array(array_type)(context, builder, array).data
    vectors = []
    for start in range(0, _CHUNK, 32):
        address = builder.gep(data, [builder.add(offset, _I64(start))])
        load = builder.load(builder.bitcast(address, lanes.as_pointer()))
        load.align = 1
        vectors.append(load)
    return vectors


def _call(builder, name: str, result, *arguments):
    function_type = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, function_type, name), arguments)


def _is_zero(builder, words):
    return builder.icmp_unsigned("==", _call(builder, "llvm.vector.reduce.or.v4i64", _I64, words), _I64(0))


def _absolute_difference(builder, x, y):
    larger = _call(builder, "llvm.umax.v32i8", _BYTES, x, y)
    return builder.sub(larger, _call(builder, "llvm.umin.v32i8", _BYTES, x, y))


@intrinsic
def _chunk_equal(typing_context, pixels, p, q):
    """True if the 96 bytes at p and at q are equal."""

    def generate(context, builder, signature, arguments):
        array, at_p, at_q = arguments
        xs = _load_chunk(context, builder, signature.args[0], array, at_p, _WORDS)
        ys = _load_chunk(context, builder, signature.args[0], array, at_q, _WORDS)
        first, second, third = (builder.xor(x, y) for x, y in zip(xs, ys, strict=True))
        return _is_zero(builder, builder.or_(builder.or_(first, second), third))

    return types.boolean(pixels, types.uint64, types.uint64), generate


@intrinsic
def _chunk_within(typing_context, pixels, p, q, limit):
    """True if none of the 96 bytes at p differs from its partner at q by more than `limit` (0..255)."""

    def generate(context, builder, signature, arguments):
        array, at_p, at_q, limit_value = arguments
        xs = _load_chunk(context, builder, signature.args[0], array, at_p, _BYTES)
        ys = _load_chunk(context, builder, signature.args[0], array, at_q, _BYTES)
        first, second, third = (_absolute_difference(builder, x, y) for x, y in zip(xs, ys, strict=True))
        largest = _call(
            builder, "llvm.umax.v32i8", _BYTES, _call(builder, "llvm.umax.v32i8", _BYTES, first, second), third
        )
        one = builder.insert_element(ir.Constant(_BYTES, ir.Undefined), limit_value, _I32(0))
        limits = builder.shuffle_vector(
            one, ir.Constant(_BYTES, ir.Undefined), ir.Constant(ir.VectorType(_I32, 32), None)
        )
        excess = _call(builder, "llvm.usub.sat.v32i8", _BYTES, largest, limits)
        return _is_zero(builder, builder.bitcast(excess, _WORDS))

    return types.boolean(pixels, types.uint64, types.uint64, types.uint8), generate


@intrinsic
def _chunk_total(typing_context, pixels, p, q):
    """Sum of the absolute differences of the 96 bytes at p and at q."""

    def generate(context, builder, signature, arguments):
        array, at_p, at_q = arguments
        xs = _load_chunk(context, builder, signature.args[0], array, at_p, _BYTES)
        ys = _load_chunk(context, builder, signature.args[0], array, at_q, _BYTES)
        wide = ir.VectorType(_I32, 32)
        total = _I64(0)
        for x, y in zip(xs, ys, strict=True):
            difference = builder.zext(_absolute_difference(builder, x, y), wide)
            part = _call(builder, "llvm.vector.reduce.add.v32i32", _I32, difference)
            total = builder.add(total, builder.zext(part, _I64))
        return total

    return types.int64(pixels, types.uint64, types.uint64), generate


@njit(nogil=True, cache=True)
def _bytes_equal(pixels, p, q, length):
    """True if the `length` bytes at offsets p and q are equal: rows of blocks that are not 32 x 32."""
    while length >= _CHUNK:
        if not _chunk_equal(pixels, np.uint64(p), np.uint64(q)):
            return False
        p, q, length = p + _CHUNK, q + _CHUNK, length - _CHUNK
    while length > 0 and pixels[p] == pixels[q]:
        p, q, length = p + 1, q + 1, length - 1
    return length == 0


@njit(nogil=True, cache=True)
def _row_equal(pixels, p, q, row_len):
    """True if the `row_len` bytes at offsets p and q are equal."""
    if row_len == _CHUNK:
        return _chunk_equal(pixels, np.uint64(p), np.uint64(q))
    return _bytes_equal(pixels, p, q, row_len)


@njit(nogil=True, cache=True)
def _block_equal(pixels, stride, p, q, block):
    """True if the blocks whose first bytes are at p and q are equal."""
    for _ in range(block):
        if not _row_equal(pixels, p, q, 3 * block):
            return False
        p += stride
        q += stride
    return True


@njit(nogil=True, cache=True)
def _block_within(pixels, stride, p, q, block, limit):
    """True if no byte of the block at p differs by more than `limit` from the block at q (metric max)."""
    row_len = 3 * block
    whole = row_len - row_len % _CHUNK
    for _ in range(block):
        for start in range(0, whole, _CHUNK):
            if not _chunk_within(pixels, np.uint64(p + start), np.uint64(q + start), np.uint8(limit)):
                return False
        for k in range(whole, row_len):
            if abs(np.int64(pixels[p + k]) - np.int64(pixels[q + k])) > limit:
                return False
        p += stride
        q += stride
    return True


@njit(nogil=True, cache=True)
def _block_total_within(pixels, stride, p, q, block, limit):
    """True if the absolute differences of the blocks at p and q sum to at most `limit` (metric mae)."""
    row_len = 3 * block
    whole = row_len - row_len % _CHUNK
    total = np.int64(0)
    for _ in range(block):
        for start in range(0, whole, _CHUNK):
            total += _chunk_total(pixels, np.uint64(p + start), np.uint64(q + start))
        for k in range(whole, row_len):
            total += abs(np.int64(pixels[p + k]) - np.int64(pixels[q + k]))
        if total > limit:
            return False
        p += stride
        q += stride
    return True


@njit(nogil=True, cache=True)
def matches(pixels, stride, p, q, block, metric, limit):
    """The omission test: is the distance of the blocks at byte offsets p and q within the threshold?

    limit: the largest byte difference (MAX) or the largest sum of them (MAE) still within it; unused by EXACT.
    """
    if p == q:
        return True
    if metric == EXACT:
        return _block_equal(pixels, stride, p, q, block)
    if metric == MAX:
        return _block_within(pixels, stride, p, q, block, limit)
    return _block_total_within(pixels, stride, p, q, block, limit)


@njit(nogil=True, cache=True)
def equal_left(pixels, block, equal):
    """Set `equal` (rows, cols) True where a block equals its left neighbour; column 0 is False.

    Goes through the image in memory order: a band of eight pixel rows of all blocks, then the next, leaving out blocks
    already known to differ. Bands are as fast as single rows from the cache and twice as fast from memory.
    """
    rows, cols = equal.shape
    stride, row_len = 3 * block * cols, 3 * block
    for r in range(rows):
        num_open = cols - 1
        for c in range(cols):
            equal[r, c] = c > 0
        for top in range(0, block, _BAND):
            if num_open == 0:
                break
            num_open = 0
            for c in range(1, cols):
                if equal[r, c]:
                    p = (r * block + top) * stride + c * row_len
                    same = True
                    for _ in range(min(_BAND, block - top)):
                        same &= _row_equal(pixels, p, p - row_len, row_len)
                        p += stride
                    equal[r, c] = same
                    num_open += same


@njit(nogil=True, cache=True)
def equal_neighbours(pixels, block, left, above):
    """Set `left` and `above` (rows, cols) True where a block equals its left neighbour, the block above it.

    With X the block, A left, B above, C above-left, transitivity leaves X = B to be looked up in the image only where
    the three equalities already known (X = A, A = C, C = B) do not decide it.
    """
    rows, cols = left.shape
    stride, row_len = 3 * block * cols, 3 * block
    equal_left(pixels, block, left)
    for c in range(cols):
        above[0, c] = False
    for r in range(1, rows):
        for c in range(cols):
            left_is_corner = c > 0 and above[r, c - 1]
            corner_is_above = c > 0 and left[r - 1, c]
            if left[r, c] and (left_is_corner or corner_is_above):
                above[r, c] = left_is_corner and corner_is_above
            elif left_is_corner and corner_is_above:
                above[r, c] = False
            else:
                p = r * block * stride + c * row_len
                above[r, c] = _block_equal(pixels, stride, p, p - block * stride, block)


@njit(nogil=True, cache=True)
def near_neighbours(pixels, block, metric, limit, left, above):
    """Set `left` and `above` (rows, cols) True where a block is within the limit of its left neighbour, of the one
    above it: see `matches`."""
    rows, cols = left.shape
    stride, row_len = 3 * block * cols, 3 * block
    for r in range(rows):
        for c in range(cols):
            p = r * block * stride + c * row_len
            left[r, c] = c > 0 and matches(pixels, stride, p, p - row_len, block, metric, limit)
            above[r, c] = r > 0 and matches(pixels, stride, p, p - block * stride, block, metric, limit)


@njit(nogil=True, cache=True)
def pred2d_exact(pixels, block, keep, source):
    """pred2d at threshold 0: fill `keep` and `source` (rows, cols).

    "C matches A" is whether the left block equals the one above it, "C matches B" whether the block above equals its
    left neighbour. So equality with the block above is looked up for two uses only: X is predicted from there, or the
    next block's choice hangs on it. What is not looked up stays unknown, and three known equalities of the square
    X, A, B, C give the fourth.
    """
    rows, cols = keep.shape
    stride, row_len = 3 * block * cols, 3 * block
    left = np.empty((rows, cols), np.bool_)
    equal_left(pixels, block, left)
    for r in range(rows):
        known, equal_above = False, False  # of the block before in this row: is it known whether it equals that above
        for c in range(cols):
            same_left = left[r, c]
            corner_is_above = c > 0 and r > 0 and left[r - 1, c]
            use_above = r > 0 and (c == 0 or (not corner_is_above and equal_above))
            if r == 0:
                known, equal_above = True, False
            elif known and same_left and (equal_above or corner_is_above):
                equal_above = equal_above and corner_is_above
            elif known and equal_above and corner_is_above:
                equal_above = False
            elif use_above or (c + 1 < cols and not left[r - 1, c + 1]):
                p = r * block * stride + c * row_len
                known, equal_above = True, _block_equal(pixels, stride, p, p - block * stride, block)
            else:
                known, equal_above = False, False
            omitted = equal_above if use_above else same_left
            keep[r, c] = not omitted
            if not omitted:
                source[r, c] = r * cols + c
            elif use_above:
                source[r, c] = source[r - 1, c]
            else:
                source[r, c] = source[r, c - 1]


@njit(nogil=True, cache=True)
def pred2d_near(pixels, block, metric, limit, keep, source):
    """pred2d above threshold 0: fill `keep` and `source` (rows, cols), comparing with what the decoder has.

    An omitted block stands as its source. Three facts save most comparisons: blocks with one source match; a kept block
    differs from the standing block it was predicted from; a block equal to its left neighbour is as near to that
    neighbour's source as the neighbour itself, which is within the threshold.
    """
    rows, cols = keep.shape
    stride, row_len = 3 * block * cols, 3 * block
    left = np.empty((rows, cols), np.bool_)
    equal_left(pixels, block, left)
    at = np.empty((rows, cols), np.int64)  # byte offset of the source
    differs_left = np.zeros((rows, cols), np.bool_)  # known: standing block and standing left neighbour do not match
    differs_above = np.zeros((rows, cols), np.bool_)
    for r in range(rows):
        for c in range(cols):
            p = r * block * stride + c * row_len
            use_above = r > 0 and c == 0
            if r > 0 and c > 0 and at[r - 1, c - 1] != at[r - 1, c] and not differs_above[r, c - 1]:
                corner = at[r - 1, c - 1]
                if matches(pixels, stride, corner, at[r, c - 1], block, metric, limit):
                    if not differs_left[r - 1, c] and not matches(
                        pixels, stride, corner, at[r - 1, c], block, metric, limit
                    ):
                        differs_left[r - 1, c] = True
                    use_above = differs_left[r - 1, c]
                else:
                    differs_above[r, c - 1] = True
            if r == 0 and c == 0:
                omitted = False
            elif use_above:
                omitted = matches(pixels, stride, at[r - 1, c], p, block, metric, limit)
            else:
                omitted = left[r, c] or matches(pixels, stride, at[r, c - 1], p, block, metric, limit)
            keep[r, c] = not omitted
            if not omitted:
                at[r, c] = p
                source[r, c] = r * cols + c
                differs_above[r, c] = use_above
                differs_left[r, c] = not use_above
            elif use_above:
                at[r, c] = at[r - 1, c]
                source[r, c] = source[r - 1, c]
                # The pair with the left neighbour is the pair one row up when neither source changed.
                differs_left[r, c] = c > 0 and at[r, c - 1] == at[r - 1, c - 1] and differs_left[r - 1, c]
            else:
                at[r, c] = at[r, c - 1]
                source[r, c] = source[r, c - 1]
                differs_above[r, c] = r > 0 and at[r - 1, c] == at[r - 1, c - 1] and differs_above[r, c - 1]


@njit(nogil=True, cache=True)
def scan(pixels, block, metric, limit, turns, keep, source):
    """raster, or serpentine if `turns` (odd rows go right to left): fill `keep` and `source` (rows, cols).

    The previous block of the scan stands as the last kept block, so each block is compared with that one. At threshold
    0 the equality bits of neighbours decide all but the first block of each row.
    """
    rows, cols = keep.shape
    stride, row_len = 3 * block * cols, 3 * block
    left = np.empty((rows, cols), np.bool_)
    equal_left(pixels, block, left)
    anchor, anchor_at = -1, np.int64(0)
    for r in range(rows):
        backwards = turns and r % 2 == 1
        for step in range(cols):
            c = cols - 1 - step if backwards else step
            p = r * block * stride + c * row_len
            if step > 0 and (left[r, c + 1] if backwards else left[r, c]):
                omitted = True
            elif anchor < 0 or (step > 0 and metric == EXACT):
                omitted = False
            else:
                omitted = matches(pixels, stride, anchor_at, p, block, metric, limit)
            if not omitted:
                anchor, anchor_at = r * cols + c, p
            keep[r, c] = not omitted
            source[r, c] = anchor


@njit(nogil=True, cache=True)
def replay_pred2d(kept, block, metric, limit, keep, slot):
    """Decode pred2d: fill `slot` (rows, cols) with the index of the kept block that stands at each place.

    kept: the kept blocks in row-major order, one under the other, as bytes (num_kept * block, 3 * block).
    """
    rows, cols = keep.shape
    row_len = 3 * block
    size = row_len * block
    num_read = 0
    for r in range(rows):
        for c in range(cols):
            if keep[r, c]:
                slot[r, c] = num_read
                num_read += 1
                continue
            use_above = c == 0
            if r > 0 and c > 0:
                a, b, corner = slot[r, c - 1] * size, slot[r - 1, c] * size, slot[r - 1, c - 1] * size
                use_above = matches(kept, row_len, corner, a, block, metric, limit) and not matches(
                    kept, row_len, corner, b, block, metric, limit
                )
            slot[r, c] = slot[r - 1, c] if use_above else slot[r, c - 1]


@njit(nogil=True, cache=True)
def label_components(left, above, label):
    """Fill `label` (rows, cols) with the flat index of the first block (row-major) of each 4-neighbour component.

    left, above: whether a block is joined to its left neighbour, to the block above it.
    """
    rows, cols = left.shape
    parent = np.arange(rows * cols)
    for r in range(rows):
        for c in range(cols):
            index = r * cols + c
            for joined, neighbour in ((left[r, c], index - 1), (above[r, c], index - cols)):
                if not joined:
                    continue
                while parent[neighbour] != neighbour:
                    parent[neighbour] = parent[parent[neighbour]]
                    neighbour = parent[neighbour]
                root = index
                while parent[root] != root:
                    root = parent[root]
                # The smaller index stays the root, so that a root is its component's first block.
                parent[max(root, neighbour)] = min(root, neighbour)
    for index in range(rows * cols):
        parent[index] = parent[parent[index]]
        label[index // cols, index % cols] = parent[index]


def compile_all() -> None:
    """Compile every kernel, or load it from the cache: a second or two of work best done once, at install."""
    image = np.zeros(2 * 3, np.uint8)
    image.flags.writeable = False
    left, above = np.empty((1, 2), np.bool_), np.empty((1, 2), np.bool_)
    keep, source = np.empty((1, 2), np.bool_), np.empty((1, 2), np.int32)
    equal_neighbours(image, 1, left, above)
    near_neighbours(image, 1, MAX, 1, left, above)
    label_components(left, above, np.empty((1, 2), np.int64))
    pred2d_exact(image, 1, keep, source)
    pred2d_near(image, 1, MAX, 1, keep, source)
    scan(image, 1, EXACT, 0, False, keep, source)
    replay_pred2d(image[:3], 1, EXACT, 0, keep, source)
