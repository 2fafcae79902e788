"""The images of a conversation from their bytes to kept blocks, with `pred3d` each beside its neighbour."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pixelprune.images.image import (
    ImageError,
    ImageSource,
    PrunedImage,
    decode_pixels,
    gather_blocks,
    prune_pixels,
    resize_image,
    unpruned_without_pixels,
)
from pixelprune.images.sizing import NO_WISH, SizeWish
from pixelprune.selection import Selection, check_settings
from pixelprune.sessions.rule import Coded, SessionSelection, code_image, coding_order
from pixelprune.settings import PruneSettings, ResizeSettings

__all__ = ["Shot", "continue_session", "prune_shots"]

ALL = PruneSettings(strategy="none")


@dataclass(frozen=True)
class Shot:
    """An image of a conversation, not decoded yet.

    wish: the size asked for it. starts_session: it has nothing to do with the image before it.
    """

    source: ImageSource
    wish: SizeWish = NO_WISH
    starts_session: bool = False


def prune_shots(
    shots: Sequence[Shot], prune: PruneSettings, resize: ResizeSettings, *, with_full: bool = False
) -> list[tuple[PrunedImage, PrunedImage | None]]:
    """Each image pruned and, `with_full`, on all blocks; in the order of the conversation.

    prune: its direction decided (`PruneSettings.resolved`) where the strategy looks at images together.
    The full image has no pixels of its own where the pruning is recoverable: they are decoded from the kept blocks of
    the conversation. No more than two images are decoded at a time. Raises ImageError naming the image's number.
    """
    _check(prune)
    walk = _Walk(prune, resize, with_full, len(shots))
    done: dict[int, tuple[PrunedImage, PrunedImage | None]] = {}
    before: Coded | None = None
    for number, neighbour in coding_order(len(shots), prune.direction):
        later = max(number, neighbour)
        if later < len(shots) and shots[later].starts_session:
            before = None
        image, full, before = walk.step(shots[number], number, before)
        done[number] = image, full
    return [done[number] for number in range(len(shots))]


def continue_session(
    shots: Sequence[Shot], prune: PruneSettings, resize: ResizeSettings, *, num_before: int, before: Coded | None
) -> tuple[list[PrunedImage], Coded | None]:
    """Images that follow `num_before` others, of which `before` is the last, coded; and the last one of these, coded.

    Forward, for conversations that grow. Raises ImageError as `prune_shots` does.
    """
    _check(prune)
    assert prune.direction != "backward" or not is_in_time(prune), "earlier images would be coded from later ones"
    walk = _Walk(prune, resize, False, num_before + len(shots))
    images = []
    for number, shot in enumerate(shots, start=num_before):
        image, _, before = walk.step(shot, number, None if shot.starts_session else before)
        images.append(image)
    return images, before


@dataclass(frozen=True)
class _Walk:
    """prune, resize, with_full: as for `prune_shots`. count: images of the conversation."""

    prune: PruneSettings
    resize: ResizeSettings
    with_full: bool
    count: int

    def step(
        self, shot: Shot, number: int, before: Coded | None
    ) -> tuple[PrunedImage, PrunedImage | None, Coded | None]:
        try:
            picture = decode_pixels(shot.source, self.resize)
            pixels = resize_image(picture, self.resize, shot.wish)
        except ImageError as error:
            raise ImageError(error.reason, f"image {number + 1} of the conversation: {error}") from error
        size = picture.shape[0], picture.shape[1]
        coded = code_image(pixels, before, self.prune, number) if is_in_time(self.prune) else None
        if coded is None:
            image = prune_pixels(pixels, self.prune, size)
        elif self.prune.strategy != "pred3d":  # a baseline that is given its budget
            image = prune_pixels(pixels, self.prune, size, coded.selection.num_kept)
        else:
            selection = coded.selection
            image = PrunedImage(gather_blocks(pixels, selection.keep), _across(selection, number), size)
        full = None
        if self.with_full:
            from pixelprune.selection.registry import is_recoverable

            full = unpruned_without_pixels(image) if is_recoverable(self.prune) else prune_pixels(pixels, ALL, size)
        return image, full, coded


def is_in_time(prune: PruneSettings) -> bool:
    """As `pixelprune.selection.registry.is_in_time`; numba loads here, not with the package."""
    from pixelprune.selection import registry

    return registry.is_in_time(prune)


def _check(prune: PruneSettings) -> None:
    check_settings(prune)
    if is_in_time(prune) and prune.direction == "auto":
        raise ValueError("prune.direction: expected backward or forward, got auto: PruneSettings.resolved decides it")


def _across(selection: SessionSelection, number: int) -> Selection:
    """The same selection as samples carry it; without numbers of images where all its blocks are its own."""
    image, source = (np.ascontiguousarray(part) for part in np.moveaxis(selection.origin, -1, 0))
    return Selection(selection.keep, source, image if (image != number).any() else None)
