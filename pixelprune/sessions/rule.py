"""pred3d: blocks of a screenshot predicted from their neighbours in the image and from the neighbour in time.

The rule, per image with a reference R: the decoded screenshot before it, or after it, of the same grid. Everything is
judged on *standing* blocks, those a decoder has. T(p) is the block of R at p, S(p) what pred2d predicts for p. A
visited neighbour N of {left, above, above-left} *tells* of a change when it does not match T(N) and matches S(N). Where
one tells, p is predicted as S(p), else as T(p); p is omitted when it matches. (0, 0) is always kept, so that an idle
step keeps a block. An image for which pred2d keeps no more blocks is coded by pred2d, *alone*.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from pixelprune.selection.selection import check_image, check_settings
from pixelprune.settings import BLOCK, PruneSettings

Direction = Literal["backward", "forward"]


@dataclass(frozen=True)
class SessionSelection:
    """Which blocks of one image of a session are kept.

    keep: bool (rows, cols). origin: int32 (rows, cols, 2), number of the image and flat index (row * cols + col) in it
        of the kept block whose pixels stand here after decoding.
    alone: coded by pred2d, without a look at the neighbour in time.
    """

    keep: np.ndarray
    origin: np.ndarray
    alone: bool

    @property
    def num_kept(self) -> int:
        return int(self.keep.sum())

    @property
    def num_blocks(self) -> int:
        return int(self.keep.size)


def select_session(
    images: Sequence[np.ndarray],
    *,
    direction: Direction = "backward",
    metric: str = "max",
    threshold: float = 0.0,
    keep_replaced: bool = False,
    borders: Sequence[int] = (),
    block: int = BLOCK,
) -> list[SessionSelection]:
    """Choose the kept blocks of every screenshot of a session, in the order of the images.

    images: uint8 (height, width, 3) each, in the order of time, sides multiples of `block`.
    direction: "backward" codes the last image alone and each earlier one from the one after it: the current screenshot
        is whole, history is what differed. "forward" codes each from the one before it: for conversations that grow.
    metric, threshold: as for `pixelprune.select`.
    keep_replaced: with "forward", also keep places that changed where pred2d keeps a block of the reference: what stood
        there is gone, which an omitted block does not show.
    borders: numbers of images that have nothing to do with the one before them.
    Images of another size than their reference are coded alone. Raises ValueError for anything outside this.
    """
    settings = _checked(images, direction, metric, threshold, keep_replaced, borders, block)
    coded: dict[int, Coded] = {}
    for number, neighbour in coding_order(len(images), direction):
        before = None if max(number, neighbour) in borders else coded.get(neighbour)
        coded[number] = code_image(images[number], before, settings, number, block)
    return [coded[number].selection for number in range(len(images))]


def coding_order(count: int, direction: str) -> list[tuple[int, int]]:
    """(image, its neighbour in time) in the order in which they are coded; the first one has a neighbour outside."""
    if direction == "forward":
        return [(number, number - 1) for number in range(count)]
    return [(number, number + 1) for number in reversed(range(count))]


@dataclass(frozen=True)
class Coded:
    """A coded image, as the next one needs it.

    standing: its pixels as a decoder has them. equal: bool (2, rows, cols), whether a block equals its left neighbour,
    the one above it; at threshold 0, where nothing else is needed of the image itself.
    """

    selection: SessionSelection
    standing: np.ndarray
    equal: np.ndarray | None = None

    def fits(self, image: np.ndarray) -> bool:
        return self.standing.shape == image.shape


def code_image(image: np.ndarray, before: Coded | None, prune: PruneSettings, number: int, block: int = BLOCK) -> Coded:
    """One image beside the one that was coded before it.

    image: uint8 (height, width, 3), sides multiples of `block`.
    before: its neighbour in time; None where there is none, or it has nothing to do with it. One of another size is not
        looked at.
    prune: metric, threshold, and keep_replaced with direction forward.
    number: of the image in its session, for `SessionSelection.origin`.
    """
    if before is None or not before.fits(image):
        return _alone(image, prune, number, block)
    return _beside(image, before, prune, number, prune.keep_replaced and prune.direction == "forward", block)


def _checked(
    images: Sequence[np.ndarray],
    direction: str,
    metric: str,
    threshold: float,
    keep_replaced: bool,
    borders: Sequence[int],
    block: int,
) -> PruneSettings:
    if direction not in get_args(Direction):
        raise ValueError(f"direction: expected one of {', '.join(get_args(Direction))}, got {direction!r}")
    if keep_replaced and direction != "forward":
        raise ValueError("keep_replaced: belongs to direction='forward'; backward, the current screenshot is whole")
    if wrong := [number for number in borders if not 0 < number < len(images)]:
        raise ValueError(f"borders: expected numbers of images from 1 to {len(images) - 1}, got {wrong[0]}")
    settings = PruneSettings("pred3d", metric, threshold, direction=direction, keep_replaced=keep_replaced)
    check_settings(settings)
    for image in images:
        check_image(image, block)
    return settings


def _alone(image: np.ndarray, settings: PruneSettings, number: int, block: int) -> Coded:
    from pixelprune.selection.kernels import equal_neighbours
    from pixelprune.selection.strategies import pixel_bytes, pred2d

    if settings.threshold == 0:
        equal = np.empty((2, image.shape[0] // block, image.shape[1] // block), np.bool_)
        equal_neighbours(pixel_bytes(image), block, *equal)
        return Coded(_pred2d_of(equal, number), image, equal)
    plain = pred2d(image, settings, block)
    origin = np.stack([np.full_like(plain.source, number), plain.source], axis=-1)
    standing = _assembled(_blocks(image, block)[plain.source])
    return Coded(SessionSelection(plain.keep, origin, alone=True), standing)


def _pred2d_of(equal: np.ndarray, number: int) -> SessionSelection:
    from pixelprune.sessions.kernels import pred2d_of

    keep, origin = np.empty(equal.shape[1:], np.bool_), np.empty((*equal.shape[1:], 2), np.int32)
    pred2d_of(*equal, number, keep, origin)
    return SessionSelection(keep, origin, alone=True)


def _beside(
    image: np.ndarray, before: Coded, settings: PruneSettings, number: int, keep_replaced: bool, block: int
) -> Coded:
    if settings.threshold == 0:
        return _beside_exact(image, before, number, keep_replaced, block)
    forced = np.zeros(before.selection.keep.shape, np.bool_)
    if keep_replaced:
        from pixelprune.selection.strategies import pred2d

        forced = pred2d(before.standing, settings, block).keep
    coded = _change_near(image, before, forced, settings, number, block)
    plain = _alone(image, settings, number, block)
    return plain if plain.selection.num_kept <= coded.selection.num_kept else coded


def _beside_exact(image: np.ndarray, before: Coded, number: int, keep_replaced: bool, block: int) -> Coded:
    from pixelprune.selection.strategies import pixel_bytes
    from pixelprune.sessions.kernels import beside_exact

    assert before.equal is not None
    width, dtype = (8, np.uint64) if block % 8 == 0 else (1, np.uint8)
    ours, theirs = (pixel_bytes(pixels).view(dtype) for pixels in (image, before.standing))
    equal, origin = np.empty_like(before.equal), np.empty_like(before.selection.origin)
    keep = np.empty(equal.shape[1:], np.bool_)
    known = before.equal, before.selection.origin, number, keep_replaced
    alone = beside_exact(ours, theirs, block, 3 * block // width, *known, equal, keep, origin)
    return Coded(SessionSelection(keep, origin, bool(alone)), image, equal)


def _change_near(
    image: np.ndarray, before: Coded, forced: np.ndarray, settings: PruneSettings, number: int, block: int
) -> Coded:
    from pixelprune.selection import kernels
    from pixelprune.selection.strategies import integer_limit
    from pixelprune.sessions.kernels import change_near

    metric, limit = integer_limit(settings.metric, settings.threshold, block)
    keep, at = np.empty(forced.shape, np.bool_), np.empty(forced.shape, np.int64)
    pixels = np.concatenate([before.standing.reshape(-1), image.reshape(-1)])
    change_near(pixels, block, metric == kernels.MAX, limit, forced, keep, at)
    # From byte offsets to numbers of blocks, those of the reference first.
    row, byte = np.divmod(at, 3 * block * block * forced.shape[1])
    place = row * forced.shape[1] + byte // (3 * block)
    own = np.stack([np.full(keep.size, number), np.arange(keep.size)], axis=-1)
    origin = np.concatenate([before.selection.origin.reshape(-1, 2), own])[place].astype(np.int32)
    blocks = np.concatenate([_blocks(before.standing, block), _blocks(image, block)])[place]
    return Coded(SessionSelection(keep, origin, alone=False), _assembled(blocks))


def _blocks(image: np.ndarray, block: int) -> np.ndarray:
    """(height, width, 3) -> (rows * cols, block, block, 3)"""
    rows, cols = image.shape[0] // block, image.shape[1] // block
    return image.reshape(rows, block, cols, block, 3).swapaxes(1, 2).reshape(rows * cols, block, block, 3)


def _assembled(blocks: np.ndarray) -> np.ndarray:
    """(rows, cols, block, block, 3) -> (height, width, 3)"""
    rows, cols, block = blocks.shape[:3]
    return np.ascontiguousarray(blocks.swapaxes(1, 2)).reshape(rows * block, cols * block, 3)
