"""The strategies that predict blocks from blocks already seen (paper section 3): none, pred2d, raster, serpentine."""

from __future__ import annotations

import numpy as np

from pixelprune.selection import kernels
from pixelprune.selection.selection import Selection
from pixelprune.settings import PruneSettings


def pixel_bytes(pixels: np.ndarray) -> np.ndarray:
    """The pixels as flat read-only bytes: a view, except that an array with gaps (a crop) is copied."""
    flat = pixels.reshape(-1).view()
    flat.flags.writeable = False  # one compiled kernel then serves writable and read-only images
    return flat


def integer_limit(metric: str, threshold: float, block: int) -> tuple[int, int]:
    """Metric code and the largest integer distance that counts as within `threshold`.

    The distance is an integer number of byte differences d over 255 (max), or over 255 times the block's 3 * block^2
    bytes (mae). Correctly rounded division makes a threshold written as a fraction of 255 inclusive: 0.2 admits 51.
    """
    if threshold == 0:
        return kernels.EXACT, 0
    scale = 255 if metric == "max" else 255 * 3 * block * block
    limit = round(threshold * scale)
    if limit / scale > threshold:
        limit -= 1
    return (kernels.MAX if metric == "max" else kernels.MAE), limit


def _empty(image: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray]:
    grid = (image.shape[0] // block, image.shape[1] // block)
    return np.empty(grid, dtype=np.bool_), np.empty(grid, dtype=np.int32)


def replay_none(kept: np.ndarray, keep: np.ndarray, settings: PruneSettings, block: int) -> np.ndarray:
    if not keep.all():
        raise ValueError(
            f"strategy 'none' keeps every block, but {int((~keep).sum())} of {keep.size} are marked omitted"
        )
    return np.arange(keep.size, dtype=np.int32).reshape(keep.shape)


def replay_pred2d(kept: np.ndarray, keep: np.ndarray, settings: PruneSettings, block: int) -> np.ndarray:
    metric, limit = integer_limit(settings.metric, settings.threshold, block)
    slot = np.empty(keep.shape, dtype=np.int32)
    kernels.replay_pred2d(pixel_bytes(kept), block, metric, limit, keep, slot)
    return slot


def _scan_order(keep: np.ndarray, turns: bool) -> np.ndarray:
    """Flat block indices in the order of the scan."""
    order = np.arange(keep.size).reshape(keep.shape)
    if turns:
        order[1::2] = order[1::2, ::-1]
    return order.ravel()


def _replay_scan(keep: np.ndarray, turns: bool) -> np.ndarray:
    order = _scan_order(keep, turns)
    kept_in_order = keep.ravel()[order]
    last_kept = order[np.maximum.accumulate(np.where(kept_in_order, np.arange(keep.size), 0))]
    rank = np.cumsum(keep.ravel()) - 1  # kept blocks are stored in row-major order, whatever the scan
    slot = np.empty(keep.size, dtype=np.int32)
    slot[order] = rank[last_kept]
    return slot.reshape(keep.shape)


def replay_raster(kept: np.ndarray, keep: np.ndarray, settings: PruneSettings, block: int) -> np.ndarray:
    return _replay_scan(keep, turns=False)


def replay_serpentine(kept: np.ndarray, keep: np.ndarray, settings: PruneSettings, block: int) -> np.ndarray:
    return _replay_scan(keep, turns=True)


def none(image: np.ndarray, settings: PruneSettings, block: int) -> Selection:
    """Keep every block: the Full model."""
    keep, source = _empty(image, block)
    keep[:] = True
    source[:] = np.arange(keep.size, dtype=np.int32).reshape(keep.shape)
    return Selection(keep, source)


def pred2d(image: np.ndarray, settings: PruneSettings, block: int) -> Selection:
    """Predict from above where the corner matches the left block but not the one above, else from the left."""
    keep, source = _empty(image, block)
    metric, limit = integer_limit(settings.metric, settings.threshold, block)
    if metric == kernels.EXACT:
        kernels.pred2d_exact(pixel_bytes(image), block, keep, source)
    else:
        kernels.pred2d_near(pixel_bytes(image), block, metric, limit, keep, source)
    return Selection(keep, source)


def raster(image: np.ndarray, settings: PruneSettings, block: int) -> Selection:
    """Row-major order, each block predicted from the one before."""
    return _scan(image, settings, block, turns=False)


def serpentine(image: np.ndarray, settings: PruneSettings, block: int) -> Selection:
    """Like raster, with odd rows from right to left, so that neighbours in the scan are neighbours in the image."""
    return _scan(image, settings, block, turns=True)


def _scan(image: np.ndarray, settings: PruneSettings, block: int, turns: bool) -> Selection:
    keep, source = _empty(image, block)
    metric, limit = integer_limit(settings.metric, settings.threshold, block)
    kernels.scan(pixel_bytes(image), block, metric, limit, turns, keep, source)
    return Selection(keep, source)
