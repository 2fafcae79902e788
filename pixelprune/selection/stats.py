"""Redundancy of images and data sets (paper appendix A): repeated blocks, and what each strategy keeps."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pixelprune.images.image import ImageError, decode_image, prune_pixels, resize_image
from pixelprune.selection.registry import is_in_time
from pixelprune.settings import BLOCK, PruneSettings, ResizeSettings

__all__ = [
    "SUFFIXES",
    "DatasetStats",
    "ImageStats",
    "count_contents",
    "find_images",
    "measure_files",
    "measure_image",
]

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp"})


@dataclass(frozen=True)
class ImageStats:
    """One image after resizing.

    original_size, size: (height, width) in pixels as stored and as the model sees it.
    num_distinct: different contents among the blocks. num_unique: blocks whose content no other block of the image has.
    kept: kept blocks per label of the settings measured.
    """

    path: str
    original_size: tuple[int, int]
    size: tuple[int, int]
    num_blocks: int
    num_distinct: int
    num_unique: int
    kept: dict[str, int]

    def retain_ratio(self, label: str) -> float:
        return self.kept[label] / self.num_blocks

    @property
    def duplicate_ratio(self) -> float:
        """Share of the blocks that another block of the image equals, the first of them included (Table 9)."""
        return 1 - self.num_unique / self.num_blocks


@dataclass
class DatasetStats:
    """Many images. `unreadable` holds (path, reason) of those that could not be measured."""

    images: list[ImageStats] = field(default_factory=list)
    unreadable: list[tuple[str, str]] = field(default_factory=list)

    @property
    def num_blocks(self) -> int:
        return sum(image.num_blocks for image in self.images)

    def retain_ratio(self, label: str) -> float:
        """Kept blocks of all images / blocks of all images (not the mean of the images' ratios)."""
        return sum(image.kept[label] for image in self.images) / self.num_blocks

    @property
    def duplicate_ratio(self) -> float:
        """Share of all blocks that another block of their own image equals, the first of them included (Table 9)."""
        return 1 - sum(image.num_unique for image in self.images) / self.num_blocks

    def mean_size(self, original: bool = False) -> tuple[float, float]:
        """Mean (height, width) in pixels, after resizing or as stored."""
        sizes = [image.original_size if original else image.size for image in self.images]
        height, width = np.mean(sizes, axis=0)
        return float(height), float(width)

    def by_retain_ratio(self, label: str) -> list[ImageStats]:
        """From the image that saves most to the one that saves least."""
        return sorted(self.images, key=lambda image: image.retain_ratio(label))

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        summary: dict[str, Any] = {"num_images": len(self.images)}
        if self.images:
            summary |= {
                "mean_original_size": self.mean_size(original=True),
                "mean_size": self.mean_size(),
                "num_blocks": self.num_blocks,
                "num_distinct_blocks": sum(image.num_distinct for image in self.images),
                "num_unique_blocks": sum(image.num_unique for image in self.images),
                "duplicate_ratio": self.duplicate_ratio,
                "retain_ratio": {label: self.retain_ratio(label) for label in self.images[0].kept},
            }
        summary["images"] = [
            {
                "path": image.path,
                "original_size": image.original_size,
                "size": image.size,
                "num_blocks": image.num_blocks,
                "num_distinct_blocks": image.num_distinct,
                "num_unique_blocks": image.num_unique,
                "duplicate_ratio": image.duplicate_ratio,
                "kept_blocks": image.kept,
                "retain_ratio": {label: image.retain_ratio(label) for label in image.kept},
            }
            for image in self.images
        ]
        summary["unreadable"] = [{"path": path, "reason": reason} for path, reason in self.unreadable]
        return summary


def count_contents(image: np.ndarray, block: int = BLOCK) -> tuple[int, int]:
    """(distinct, unique) of a block-aligned uint8 image (height, width, 3): how many contents its blocks have, and how
    many of them stand in one block only; compared byte by byte."""
    rows, cols = image.shape[0] // block, image.shape[1] // block
    seen: Counter[bytes] = Counter()
    for band in image.reshape(rows, block, cols, block, 3):
        seen.update(tile.tobytes() for tile in band.swapaxes(0, 1))
    return len(seen), sum(times == 1 for times in seen.values())


def measure_image(
    source: Path | bytes | Image.Image, rules: Mapping[str, PruneSettings], resize: ResizeSettings, name: str = ""
) -> ImageStats:
    """Decode, resize and measure one image under each of the labelled rules. Raises ImageError if it cannot be used.

    name: for `ImageStats.path`, where the source is no path.
    """
    picture = decode_image(source, resize)
    image = resize_image(picture, resize)
    original_size = (picture.height, picture.width)
    kept = {label: prune_pixels(image, rule, original_size).selection.num_kept for label, rule in rules.items()}
    height, width = image.shape[:2]
    num_blocks = height * width // BLOCK**2
    return ImageStats(name or str(source), original_size, (height, width), num_blocks, *count_contents(image), kept)


def find_images(paths: Iterable[Path]) -> tuple[list[Path], list[tuple[str, str]]]:
    """Files named, and PNG, JPEG and WebP files below folders named, each folder's sorted.

    Also returns (folder, reason) of folders that cannot be listed.
    """
    found: list[Path] = []
    unreadable: list[tuple[str, str]] = []

    def note(error: OSError) -> None:
        unreadable.append((str(error.filename), error.strerror or type(error).__name__))

    for path in paths:
        if not path.is_dir():
            found.append(path)
            continue
        for folder, folders, names in os.walk(path, onerror=note):
            folders.sort()
            found.extend(Path(folder, name) for name in sorted(names) if Path(name).suffix.lower() in SUFFIXES)
    return found, unreadable


def measure_files(
    paths: Sequence[Path], rules: Mapping[str, PruneSettings], resize: ResizeSettings, num_threads: int
) -> Iterator[ImageStats | tuple[str, str]]:
    """Measure each file in turn, on several threads; yields its statistics or (path, reason) if it cannot be used.

    For rules that look at images in time, those of a folder are one session, in the order given; what cannot be read is
    left out of it.
    """
    in_time = {label: rule for label, rule in rules.items() if is_in_time(rule)}
    alone = {label: rule for label, rule in rules.items() if label not in in_time}

    def measure(path: Path) -> ImageStats | tuple[str, str]:
        try:
            return measure_image(path, alone, resize)
        except ImageError as error:
            return str(path), str(error)

    with ThreadPoolExecutor(num_threads) as threads:
        if not in_time:
            yield from threads.map(measure, paths)
            return
        for _, session in itertools.groupby(paths, key=lambda path: path.parent):
            yield from _of_session(list(threads.map(measure, session)), rules, in_time, resize)


def _of_session(
    outcomes: list[ImageStats | tuple[str, str]],
    rules: Mapping[str, PruneSettings],
    in_time: Mapping[str, PruneSettings],
    resize: ResizeSettings,
) -> Iterator[ImageStats | tuple[str, str]]:
    """The same with what is kept of each image by the rules that look at all of them."""
    from pixelprune.sessions.pruning import Shot, prune_shots

    read = [outcome for outcome in outcomes if isinstance(outcome, ImageStats)]
    kept: dict[str, dict[str, int]] = {image.path: dict(image.kept) for image in read}
    for label, rule in in_time.items():
        pruned = prune_shots([Shot(Path(image.path)) for image in read], rule, resize)
        for image, (one, _) in zip(read, pruned, strict=True):
            kept[image.path][label] = one.selection.num_kept
    for outcome in outcomes:
        if isinstance(outcome, ImageStats):
            ordered = {label: kept[outcome.path][label] for label in rules}
            outcome = dataclasses.replace(outcome, kept=ordered)
        yield outcome
