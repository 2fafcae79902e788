"""Files of conversations, to look at what is kept of their images: JSON lines in the training format."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pixelprune.images.image import ImageError, decode_image, resize_image
from pixelprune.records.images import read_image
from pixelprune.records.reader import parse_record
from pixelprune.records.record import RecordError
from pixelprune.selection.stats import ImageStats, count_contents
from pixelprune.sessions.pruning import Shot, prune_shots
from pixelprune.settings import BLOCK, PruneSettings, ResizeSettings

__all__ = ["Conversation", "find_conversations", "measure_conversations", "num_conversations", "read_conversation"]

_SUFFIX = ".jsonl"


@dataclass(frozen=True)
class Conversation:
    """The images of one record in their order. names: what each is called, with the file and its line."""

    names: tuple[str, ...]
    shots: tuple[Shot, ...]


def read_conversation(path: Path, line: int, root: Path) -> Conversation:
    """The record in that line (from 1 on) of a file. Raises RecordError for what is wrong with it, or no such line."""
    for number, text in _lines(path):
        if number == line:
            return _conversation(path, number, text, root)
    raise RecordError("no_such_record", f"{path}: there is no record in line {line}")


def measure_conversations(
    path: Path, rules: Mapping[str, PruneSettings], resize: ResizeSettings, num_threads: int, root: Path
) -> Iterator[list[ImageStats | tuple[str, str]]]:
    """The images of every record as its rules keep them together; one (line, reason) for a record that is not usable.

    root: what image paths are relative to. A picture counts as often as it stands in a record: so it is trained on.
    """

    def measure(numbered: tuple[int, bytes]) -> list[ImageStats | tuple[str, str]]:
        number, text = numbered
        try:
            return list(_measured(_conversation(path, number, text, root), rules, resize))
        except (RecordError, ImageError) as error:
            return [(f"{path}:{number}", f"{path}, line {number}: {error}")]

    with ThreadPoolExecutor(num_threads) as threads:
        yield from threads.map(measure, _lines(path))


def num_conversations(path: Path) -> int:
    """Records of a file, read or not."""
    return sum(1 for _ in _lines(path))


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        yield from ((number, text) for number, text in enumerate(file, start=1) if text.strip())


def _conversation(path: Path, line: int, text: bytes, root: Path) -> Conversation:
    try:
        row = json.loads(text)
    except ValueError as error:
        raise RecordError("not_json", f"not a line of JSON: {error}") from error
    images = parse_record(row).images
    sources = [image.source if isinstance(image.source, str) else f"image {n}" for n, image in enumerate(images, 1)]
    shots = tuple(Shot(read_image(image, root), image.wish, image.starts_session) for image in images)
    return Conversation(tuple(f"{path}:{line} {source}" for source in sources), shots)


def _measured(
    conversation: Conversation, rules: Mapping[str, PruneSettings], resize: ResizeSettings
) -> Iterator[ImageStats]:
    kept = {
        label: [one.selection.num_kept for one, _ in prune_shots(conversation.shots, rule, resize)]
        for label, rule in rules.items()
    }
    for number, (name, shot) in enumerate(zip(conversation.names, conversation.shots, strict=True)):
        picture = decode_image(shot.source, resize)
        image = resize_image(picture, resize, shot.wish)
        size = image.shape[0], image.shape[1]
        yield ImageStats(
            name,
            (picture.height, picture.width),
            size,
            size[0] * size[1] // BLOCK**2,
            *count_contents(image),
            {label: counts[number] for label, counts in kept.items()},
        )


def find_conversations(paths: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """The files of conversations among the paths, and the other paths."""
    found = [path for path in paths if path.suffix.lower() == _SUFFIX and not path.is_dir()]
    return found, [path for path in paths if path not in found]
