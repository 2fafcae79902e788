"""Which prepared images are the same picture: what the vision tower needs to encode once.

Compared is what reaches the tower and what it decodes to (kept pixels, where they stand, what stands in for what was
omitted), never names or files: one file in two sizes is two pictures, one picture in two files is one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import xxhash

from pixelprune.images.image import PrunedImage

__all__ = ["distinct_images", "image_key"]


def image_key(images: Sequence[PrunedImage], number: int, keys: dict[int, int]) -> int:
    """A negative number of 63 bits that stands for one of the prepared images of a conversation.

    An image that stands on others of its conversation is the same where these are, too: its pixels, which a teacher is
    given, are decoded from theirs. keys: those of images that the caller keeps, by id(image); one picture, or one
    conversation, of many records is hashed once.
    """
    image = images[number]
    if id(image) not in keys:
        selection = image.selection
        digest = xxhash.xxh3_64(repr(selection.keep.shape).encode())
        arrays = [image.blocks, np.packbits(selection.keep), selection.source]
        if selection.image is not None:
            arrays.append(selection.image)
            for other in np.unique(selection.image).tolist():
                arrays += [images[other].blocks, np.packbits(images[other].selection.keep)]
        for array in arrays:
            digest.update(np.ascontiguousarray(array).data)
        keys[id(image)] = -1 - (digest.intdigest() >> 1)
    return keys[id(image)]


def distinct_images(places: Iterable[tuple[Sequence[PrunedImage], int]]) -> tuple[int, ...]:
    """Of each place, the number of its picture, counted from 0 in the order in which pictures first appear.

    places: the images of a conversation, and which of them stands there.
    """
    keys: dict[int, int] = {}
    numbers: dict[int, int] = {}
    return tuple(numbers.setdefault(image_key(images, number, keys), len(numbers)) for images, number in places)
