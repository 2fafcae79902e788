"""What the index needs of a picture, kept for the other records that show it: a screenshot is decoded once.

Not its pixels: which blocks are kept, and the hash of the prepared picture. Processes that build one index tell each
other through files in its folder, one for each process, which is read by the others as it grows; so do processes of
other ranks, and those of a build that goes on after it was killed. Two that meet a picture at the same moment both
decode it.
"""

from __future__ import annotations

import struct
import time
import uuid
from pathlib import Path
from typing import BinaryIO

import numpy as np
import xxhash

from pixelprune.images.distinct import image_key
from pixelprune.images.image import PrunedImage
from pixelprune.records.prepare import PicturePair, ShotKey
from pixelprune.selection import Selection
from pixelprune.settings import BLOCK
from training.data.index_folder import index_writes

__all__ = ["MeasuredPictures", "forget_pictures"]

_FRAME = struct.Struct("<IQ")
"""Bytes of an entry, and their hash: a process may be killed while it writes one."""
_ENTRY = struct.Struct("<16sqHHIII")
"""Name of the picture, its key, rows and columns of blocks, blocks before a baseline scaled it, height, width; the
keep mask follows, eight blocks a byte."""
_PATTERN = "pictures-*.bin"
MAX_BYTES = 64 << 20
"""Of entries held in memory; the oldest go first."""
LOOK_SECONDS = 1.0


class MeasuredPictures:
    """A memo for `Preparer.steps` that hands out pictures without pixels.

    folder: where processes tell each other; without one they do not. Raises UserError when it cannot be written.
    """

    def __init__(self, folder: Path | None = None):
        self.folder = folder
        self._entries: dict[bytes, bytes] = {}
        self._num_bytes = 0
        self._handed_out: dict[int, tuple[PrunedImage, int]] = {}
        self._conversation: dict[ShotKey, list[PicturePair]] = {}
        self._mine = folder / f"pictures-{uuid.uuid4().hex}.bin" if folder else None
        self._file: BinaryIO | None = None
        self._read_up_to: dict[Path, int] = {}
        self._looked = float("-inf")

    def __contains__(self, key: ShotKey) -> bool:
        return _name(key) in self._entries

    def __getitem__(self, key: ShotKey) -> list[PicturePair]:
        if key in self._conversation:
            return self._conversation[key]
        _, hashed, rows, cols, unscaled, height, width = _ENTRY.unpack_from(entry := self._entries[_name(key)])
        bits = np.unpackbits(np.frombuffer(entry, np.uint8, offset=_ENTRY.size), count=rows * cols)
        selection = Selection(bits.astype(bool).reshape(rows, cols), np.zeros((0, 0), np.int32))
        image = PrunedImage(np.zeros((0, BLOCK, BLOCK, 3), np.uint8), selection, (height, width), unscaled)
        # Held together with the picture, or another picture could come to have its id.
        self._handed_out[id(image)] = image, hashed
        return [(image, None)]

    def __setitem__(self, key: ShotKey, pairs: list[PicturePair]) -> None:
        if (
            len(key) != 1
        ):  # a conversation without pictures, or whose pictures are pruned together: hardly one comes twice
            self._conversation[key] = pairs
            return
        ((image, full),) = pairs
        assert full is None, "the index measures pruned pictures"
        rows, cols = image.selection.keep.shape
        entry = _ENTRY.pack(
            _name(key), image_key([image], 0, {}), rows, cols, image.unscaled_blocks, *image.original_size
        ) + bytes(np.packbits(image.selection.keep))
        self._remember(entry)
        if self._mine:
            with index_writes(self._mine):
                self._file = self._file or self._mine.open("ab", buffering=0)
                self._file.write(_FRAME.pack(len(entry), xxhash.xxh3_64_intdigest(entry)) + entry)

    def take_keys(self) -> dict[int, int]:
        """By id(image), the keys (`image_key`) of pictures handed out since the last call."""
        keys = {number: key for number, (_, key) in self._handed_out.items()}
        self._handed_out, self._conversation = {}, {}
        return keys

    def look_around(self) -> None:
        """Read what other processes have told meanwhile, at most once a second."""
        if self.folder is None or time.monotonic() - self._looked < LOOK_SECONDS:
            return
        self._looked = time.monotonic()
        for file in self.folder.glob(_PATTERN):
            if file != self._mine:
                self._read_on(file)

    def _read_on(self, file: Path) -> None:
        start = self._read_up_to.get(file, 0)
        try:
            with file.open("rb") as opened:
                opened.seek(start)
                data = opened.read()
        except OSError:  # the index is complete, and the file gone
            return
        place = 0
        while place + _FRAME.size <= len(data):
            length, hashed = _FRAME.unpack_from(data, place)
            entry = data[place + _FRAME.size : place + _FRAME.size + length]
            if len(entry) < length or xxhash.xxh3_64_intdigest(entry) != hashed:
                break  # not written to its end, or never to be
            self._remember(entry)
            place += _FRAME.size + length
        self._read_up_to[file] = start + place

    def _remember(self, entry: bytes) -> None:
        self._entries[entry[:16]] = entry
        self._num_bytes += len(entry)
        while self._num_bytes > MAX_BYTES:
            oldest = next(iter(self._entries))
            self._num_bytes -= len(self._entries.pop(oldest))


def forget_pictures(folder: Path) -> None:
    """Of an index that is complete."""
    for file in folder.glob(_PATTERN):
        file.unlink(missing_ok=True)


def _name(key: ShotKey) -> bytes:
    """Bytes and wishes of the picture, whose repr is their content."""
    return xxhash.xxh3_128_digest(repr(key).encode())
