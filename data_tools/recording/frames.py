"""Frames of a video file, sampled by change: what a recording of a screen shows, once each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.convert.dropped import DropError
from pixelprune.extras import require_extra
from pixelprune.images.image_file import open_regular
from pixelprune.settings import BLOCK

# The demuxer is named, so that a file cannot be a playlist which has others opened.
CONTAINERS = {
    ".mp4": "mov", ".m4v": "mov", ".mov": "mov", ".mkv": "matroska", ".webm": "matroska", ".avi": "avi",
}  # fmt: skip
MAX_SIDE = 8192
"""Wider or higher videos are refused."""


@dataclass(frozen=True)
class FrameSettings:
    """Which frames of a video are taken."""

    per_second: float = 2.0
    """How often the screen is looked at, in the video's own time."""
    min_change: float = 0.005
    """A frame is taken when more than this share of its blocks differs from the last one taken."""
    tolerance: float = 4.0
    """A block differs when its mean absolute difference exceeds this, in steps of 1/255: less is the codec's noise."""
    max_frames: int = 64
    """A video that changes more often is left out, not cut."""
    max_seconds: float = 3600.0
    """A longer video is left out."""


@dataclass(frozen=True)
class Frame:
    """seconds: when it began to be shown. image: uint8 (height, width, 3)."""

    seconds: float
    image: np.ndarray


def changed_share(one: np.ndarray, other: np.ndarray, tolerance: float) -> float:
    """Share of the 32x32 blocks of two images of one size whose mean absolute difference exceeds `tolerance`."""
    difference = np.abs(one.astype(np.int16) - other).sum(axis=2, dtype=np.int64)
    rows, cols = (np.arange(0, side, BLOCK) for side in difference.shape)
    sums = np.add.reduceat(np.add.reduceat(difference, rows, axis=0), cols, axis=1)
    heights, widths = (np.diff([*starts, side]) for starts, side in zip((rows, cols), difference.shape, strict=True))
    return float((sums > tolerance * 3 * np.outer(heights, widths)).mean())


def sample_frames(path: Path, settings: FrameSettings, counts: Counter[str]) -> list[Frame]:
    """The frames that differ, in their order, the first among them; what was looked at is counted.

    Raises DropError for a file that is no video, is too large, too long, turned by its metadata, or changes too often.
    """
    taken: list[Frame] = []
    for frame in _shown_frames(path, settings):
        counts["looked at"] += 1
        if taken and taken[-1].image.shape != frame.image.shape:
            raise DropError("frames of several sizes")
        if taken and changed_share(taken[-1].image, frame.image, settings.tolerance) <= settings.min_change:
            counts["unchanged"] += 1
            continue
        if len(taken) == settings.max_frames:
            raise DropError(f"more than {settings.max_frames} frames that differ (--max-frames, --min-change)")
        taken.append(frame)
    if not taken:
        raise DropError("a video without a frame")
    counts["taken"] += len(taken)
    return taken


def _shown_frames(path: Path, settings: FrameSettings) -> Iterator[Frame]:
    """What is shown at every look, each frame once: recorders write no frames while nothing moves."""
    step, due = 1 / settings.per_second, 0.0
    last: Any = None
    for frame in _decoded(path, settings):
        if frame.time > due and last is not None:
            yield Frame(round(last.time, 3), last.to_ndarray(format="rgb24"))
            last = None
        while frame.time > due:
            due += step
        last = frame
    if last is not None:
        yield Frame(round(last.time, 3), last.to_ndarray(format="rgb24"))


def _decoded(path: Path, settings: FrameSettings) -> Iterator[Any]:
    require_extra("data_tools recording", "recordings", ("av",))
    import av

    container_format = CONTAINERS.get(path.suffix.lower())
    if container_format is None:
        raise DropError(f"not one of {', '.join(CONTAINERS)}")
    try:
        with open_regular(path) as file, av.open(file, "r", format=container_format) as container:
            if not container.streams.video:
                raise DropError("no video stream")
            stream = container.streams.video[0]
            if max(stream.codec_context.width, stream.codec_context.height) > MAX_SIDE:
                raise DropError(f"wider or higher than {MAX_SIDE} pixels")
            for frame in container.decode(stream):
                if frame.time is None:
                    raise DropError("a frame without a time")
                if frame.time > settings.max_seconds:
                    raise DropError(f"longer than {settings.max_seconds:g} seconds (--max-seconds)")
                if frame.rotation:
                    raise DropError("turned by its metadata: write it upright first (ffmpeg does)")
                yield frame
    except FileNotFoundError as error:
        raise DropError("video missing") from error
    except (OSError, av.error.FFmpegError) as error:
        raise DropError("video unreadable") from error
