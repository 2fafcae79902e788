"""A session as its kept blocks, and the screenshots again: the proof that prediction in time loses nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pixelprune.codec import Compressed, decode
from pixelprune.sessions.rule import Direction, SessionSelection, select_session
from pixelprune.settings import BLOCK

__all__ = ["CompressedSession", "decode_session", "encode_session"]


@dataclass(frozen=True)
class CompressedSession:
    """All that a decoder needs, per image in the order of time: kept blocks, where they stood, and one bit.

    blocks: uint8 (K_i, block, block, 3), row-major. keeps: bool (rows_i, cols_i). alone: coded without its neighbour.
    """

    blocks: tuple[np.ndarray, ...]
    keeps: tuple[np.ndarray, ...]
    alone: tuple[bool, ...]
    direction: Direction
    metric: str
    threshold: float


def encode_session(images: Sequence[np.ndarray], *, block: int = BLOCK, **settings: Any) -> CompressedSession:
    """Keep the blocks that `select_session` keeps: its arguments and errors."""
    selections = select_session(images, block=block, **settings)
    return CompressedSession(
        tuple(_kept(image, selection, block) for image, selection in zip(images, selections, strict=True)),
        tuple(selection.keep for selection in selections),
        tuple(selection.alone for selection in selections),
        settings.get("direction", "backward"),
        settings.get("metric", "max"),
        settings.get("threshold", 0.0),
    )


def _kept(image: np.ndarray, selection: SessionSelection, block: int) -> np.ndarray:
    rows, cols = selection.keep.shape
    kept: np.ndarray = image.reshape(rows, block, cols, block, 3).swapaxes(1, 2)[selection.keep]
    return kept


def decode_session(session: CompressedSession) -> list[np.ndarray]:
    """The screenshots, uint8 (height, width, 3) each, from what `session` holds and nothing else.

    Equal to those encoded at threshold 0; otherwise each block is within the threshold of the original. Raises
    ValueError where the parts do not fit together.
    """
    count = len(session.keeps)
    if not len(session.blocks) == len(session.alone) == count:
        raise ValueError(f"expected as many blocks and bits as masks, got {len(session.blocks)}, {len(session.alone)}")
    images: dict[int, np.ndarray] = {}
    order = range(count) if session.direction == "forward" else reversed(range(count))
    step = -1 if session.direction == "forward" else 1
    for number in order:
        blocks, keep = session.blocks[number], session.keeps[number]
        if session.alone[number]:
            images[number] = decode(Compressed(blocks, keep, "pred2d", session.metric, session.threshold))
            continue
        reference = images.get(number + step)
        side = blocks.shape[1]
        if reference is None or reference.shape[:2] != (keep.shape[0] * side, keep.shape[1] * side):
            raise ValueError(f"image {number}: it was predicted from its neighbour, which is not there in its size")
        images[number] = _Decoder(reference, blocks, keep, session.metric, session.threshold).image()
    return [images[number] for number in range(count)]


class _Decoder:
    """One image beside its reference, block by block from the rule's definition."""

    def __init__(self, reference: np.ndarray, blocks: np.ndarray, keep: np.ndarray, metric: str, threshold: float):
        if len(blocks) != keep.sum():
            raise ValueError(f"blocks: the mask keeps {int(keep.sum())} blocks, but {len(blocks)} came")
        if not keep[0, 0]:
            raise ValueError("keep: the first block is always kept, but the mask omits it")
        self.blocks, self.keep, self.side = blocks, keep, blocks.shape[1]
        self.metric, self.threshold = metric, threshold
        rows, cols = keep.shape
        self.reference = reference.reshape(rows, self.side, cols, self.side, 3).swapaxes(1, 2)
        self.standing = np.empty_like(self.reference)

    def image(self) -> np.ndarray:
        rows, cols = self.keep.shape
        tells = np.zeros((rows, cols), bool)
        waiting = iter(self.blocks)
        for r, c in np.ndindex(rows, cols):
            told = any(tells[a, b] for a, b in ((r, c - 1), (r - 1, c), (r - 1, c - 1)) if a >= 0 and b >= 0)
            spatial = self._spatial(r, c)
            if self.keep[r, c]:
                self.standing[r, c] = next(waiting)
            else:
                self.standing[r, c] = spatial if told else self.reference[r, c]
            here = self.standing[r, c]
            changed = not self._match(here, self.reference[r, c])
            tells[r, c] = changed and spatial is not None and self._match(here, spatial)
        return np.ascontiguousarray(self.standing.swapaxes(1, 2)).reshape(rows * self.side, cols * self.side, 3)

    def _spatial(self, r: int, c: int) -> np.ndarray | None:
        """What pred2d predicts at a place; None at the first."""
        if r == 0 and c == 0:
            return None
        left: np.ndarray = self.standing[r, c - 1]
        above: np.ndarray = self.standing[r - 1, c]
        if r == 0 or c == 0:
            return left if c else above
        corner = self.standing[r - 1, c - 1]
        return above if self._match(corner, left) and not self._match(corner, above) else left

    def _match(self, one: np.ndarray, other: np.ndarray) -> bool:
        difference = np.abs(one.astype(np.int16) - other)
        if self.metric == "max":
            return bool(difference.max() / 255 <= self.threshold)
        return bool(difference.sum(dtype=np.int64) / (255 * difference.size) <= self.threshold)
