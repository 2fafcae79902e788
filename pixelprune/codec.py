"""Compress an image to its kept blocks and decode it again: the proof that a selection loses nothing it should not."""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pixelprune.selection import check_settings, select
from pixelprune.settings import BLOCK, PruneSettings

__all__ = ["MAX_PIXELS", "Compressed", "decode", "decode_sources", "encode"]

_FORMAT = "pixelprune-compressed-1"
MAX_PIXELS = 100_000_000
"""The largest image that `Compressed.load` takes unless told otherwise: the limit of decoding images, too."""
_OTHER_BYTES = 1 << 16
_FIELDS = {"format", "blocks", "keep", "strategy", "metric", "threshold"}


@dataclass(frozen=True)
class Compressed:
    """All a decoder needs: kept blocks, where they stood, and the rule that predicted the others.

    blocks: uint8 (K, block, block, 3), kept blocks in row-major order of their position, whatever the scan order.
    keep: bool (rows, cols) with K True entries.
    Raises ValueError when the parts do not fit together.
    """

    blocks: np.ndarray
    keep: np.ndarray
    strategy: str
    metric: str
    threshold: float

    def __post_init__(self) -> None:
        from pixelprune.selection.registry import get_strategy

        check_settings(self.settings)
        if get_strategy(self.strategy).replay is None:
            raise ValueError(f"strategy {self.strategy!r} predicts nothing, so its omitted blocks cannot be decoded")
        keep, blocks = self.keep, self.blocks
        if keep.dtype != np.bool_ or keep.ndim != 2 or keep.size == 0:
            raise ValueError(f"keep: expected a non-empty bool array (rows, cols), got {keep.dtype} {keep.shape}")
        if blocks.dtype != np.uint8 or blocks.ndim != 4 or blocks.shape[1] != blocks.shape[2] or blocks.shape[3] != 3:
            raise ValueError(f"blocks: expected uint8 (K, side, side, 3), got {blocks.dtype} {blocks.shape}")
        if blocks.shape[1] < 1:
            raise ValueError(f"blocks: expected a side of at least one pixel, got {blocks.shape}")
        if len(blocks) != keep.sum():
            raise ValueError(f"blocks: the mask keeps {int(keep.sum())} blocks, but {len(blocks)} came")
        if not keep[0, 0]:
            raise ValueError("keep: the first block is always kept, but the mask omits it")
        if self.strategy == "none" and not keep.all():
            raise ValueError(f"keep: strategy 'none' keeps all blocks, but {int((~keep).sum())} are marked omitted")

    @property
    def settings(self) -> PruneSettings:
        return PruneSettings(strategy=self.strategy, metric=self.metric, threshold=self.threshold)

    @property
    def block(self) -> int:
        """Side of a block in pixels."""
        return int(self.blocks.shape[1])

    def save(self, path: Path | str) -> None:
        """Write one .npz file (deflated, without pickle) to exactly this path."""
        buffer = io.BytesIO()
        np.savez_compressed(
            buffer,
            format=np.array(_FORMAT),
            blocks=self.blocks,
            keep=self.keep,
            strategy=np.array(self.strategy),
            metric=np.array(self.metric),
            threshold=np.array(self.threshold, dtype=np.float64),
        )
        Path(path).write_bytes(buffer.getvalue())

    @classmethod
    def load(cls, path: Path | str, max_pixels: int = MAX_PIXELS) -> Compressed:
        """Read what `save` wrote. ValueError for any other or inconsistent content, OSError if unreadable.

        max_pixels: refuse an image of more than this, before anything is inflated: a file of kilobytes can hold it.
        """
        data = Path(path).read_bytes()
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                num_bytes = sum(member.file_size for member in archive.infolist())
            # Three bytes for a pixel, one for a block (at least a pixel) of the mask; then headers, texts and numbers.
            if num_bytes <= 4 * max_pixels + _OTHER_BYTES:
                with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
                    fields = {name: arrays[name] for name in arrays.files}
        except Exception as error:
            # zipfile, zlib and numpy meet damage with a dozen classes; MemoryError is a header that lies about a shape.
            raise ValueError(f"{path}: not a compressed image ({error})") from error
        if num_bytes > 4 * max_pixels + _OTHER_BYTES:
            raise ValueError(f"{path}: {num_bytes} bytes of content, more than an image of max_pixels={max_pixels} has")
        if fields.keys() != _FIELDS or fields["format"].shape != () or str(fields["format"]) != _FORMAT:
            raise ValueError(f"{path}: expected the fields {sorted(_FIELDS)} of {_FORMAT}, got {sorted(fields)}")
        try:
            threshold = float(fields["threshold"])
            made = cls(fields["blocks"], fields["keep"], str(fields["strategy"]), str(fields["metric"]), threshold)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: inconsistent content: {error}") from error
        if made.keep.size * made.block**2 > max_pixels:
            raise ValueError(f"{path}: {made.keep.size} blocks of side {made.block} exceed max_pixels={max_pixels}")
        return made


def encode(
    image: np.ndarray,
    *,
    strategy: str = "pred2d",
    metric: str = "max",
    threshold: float = 0.0,
    block: int = BLOCK,
) -> Compressed:
    """Keep the blocks `select` keeps: its arguments and errors. ValueError for baselines, which cannot be decoded."""
    keep = select(image, strategy=strategy, metric=metric, threshold=threshold, block=block).keep
    rows, cols = keep.shape
    grid = image.reshape(rows, block, cols, block, 3).swapaxes(1, 2)
    return Compressed(grid[keep], keep, strategy, metric, threshold)


def decode_sources(compressed: Compressed) -> np.ndarray:
    """int32 (rows, cols): index into `compressed.blocks` of the block standing at each place."""
    from pixelprune.selection.registry import get_strategy

    replay = get_strategy(compressed.strategy).replay
    assert replay is not None, "checked when the Compressed was made"
    return replay(compressed.blocks, compressed.keep, compressed.settings, compressed.block)


def decode(compressed: Compressed) -> np.ndarray:
    """The image, uint8 (height, width, 3), from what `compressed` holds and nothing else.

    Equal to the encoded image at threshold 0 (Proposition 1); otherwise each block is within the threshold of the
    original by the metric it was encoded with (Proposition 2).
    """
    rows, cols = compressed.keep.shape
    side = compressed.block
    standing: np.ndarray = compressed.blocks[decode_sources(compressed)]
    return standing.swapaxes(1, 2).reshape(rows * side, cols * side, 3)
