"""One corpus into the training format: conversations normalised, coordinates made relative, everything counted."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from data_tools.convert.coordinates import read_place, write_place
from data_tools.convert.image_files import ImageFiles
from data_tools.convert.shapes import DropError, Turn, check_unicode, read_turns


@dataclass(frozen=True)
class ConvertSettings:
    """How answers are read and written."""

    source: str
    coordinates: str | None = None
    """What numbers in answers mean (absolute, relative, fraction); None leaves answers as they are."""
    answer: str = "auto"
    keep_system: bool = True
    """Keep system turns. Corpora with absolute coordinates state a screen size there that is no longer true."""


@dataclass
class ConvertReport:
    """Counts of one conversion."""

    num_read: int = 0
    num_written: int = 0
    num_answers: int = 0
    dropped_records: Counter[str] = field(default_factory=Counter)
    dropped_turns: Counter[str] = field(default_factory=Counter)


class Converter:
    """Turns records into records of the training format; `report` counts what was left out and why."""

    def __init__(self, images: ImageFiles, settings: ConvertSettings) -> None:
        self.images = images
        self.settings = settings
        self.report = ConvertReport()

    def convert(self, record: Any) -> dict[str, Any] | None:
        """The record in the training format, or None where it was dropped (and counted)."""
        number = self.report.num_read
        self.report.num_read += 1
        try:
            made = self._convert(record, number)
        except DropError as error:
            self.report.dropped_records[str(error)] += 1
            return None
        self.report.num_written += 1
        return made

    def _convert(self, record: Any, number: int) -> dict[str, Any]:
        turns = read_turns(record)
        record_id = record.get("id")
        written = f"{self.settings.source}-{number:08d}" if record_id is None else str(record_id)
        check_unicode([written, *(value for turn in turns for _, value in turn.parts)])
        names = [name for turn in turns for name in turn.images]
        with_coordinates = self.settings.coordinates is not None
        sizes = [self.images.size(name, has_coordinates=with_coordinates) for name in names]
        metadata = _own_metadata(record)
        metadata |= {"source": self.settings.source, "image_sizes": [list(size) for size in sizes]}
        if not self.settings.keep_system:
            turns = [turn for turn in turns if turn.role != "system"]
        if with_coordinates:
            if len(sizes) != 1:
                raise DropError("no image" if not sizes else "several images: coordinates could mean any")
            _check_stated_size(record, sizes[0])
            turns, places = self._relative(turns, sizes[0])
            metadata["image_size"] = list(sizes[0])
            if len(places) == 1:
                metadata.update(places[0])
        if not any(turn.role == "assistant" for turn in turns):
            raise DropError("no answer")
        weight = {"weight": _weight(record)} if "weight" in record else {}
        return {"id": written, "messages": [self._message(turn) for turn in turns], "metadata": metadata, **weight}

    def _relative(self, turns: list[Turn], size: tuple[int, int]) -> tuple[list[Turn], list[dict[str, Any]]]:
        """Keep the exchanges whose answer gives a place, and write it relative; the image stays in the first one."""
        assert self.settings.coordinates is not None
        kept: list[Turn] = []
        asked: list[Turn] = []
        places: list[dict[str, Any]] = []
        lost_images: tuple[tuple[str, str], ...] = ()
        reasons: Counter[str] = Counter()
        for turn in turns:
            if turn.role == "system":
                kept.append(turn)
            elif turn.role == "user":
                asked.append(turn)
            else:
                try:
                    if not asked:
                        raise DropError("an answer without a question")
                    answer = read_place(turn.text, size, self.settings.coordinates)
                    text = write_place(answer, size, self.settings.answer)
                except DropError as error:
                    reasons[str(error)] += 1
                    lost_images += tuple(part for question in asked for part in question.parts if part[0] == "image")
                else:
                    asked[0] = replace(asked[0], parts=lost_images + asked[0].parts)
                    lost_images = ()
                    kept += [*asked, replace(turn, parts=(("text", text),))]
                    place: dict[str, Any] = {"point": [round(side, 3) for side in answer.point or ()]}
                    if answer.box is not None:
                        place["bbox"] = [round(side, 3) for side in answer.box]
                    places.append(place)
                asked = []
        if not places:
            raise DropError(reasons.most_common(1)[0][0] if reasons else "no answer")
        self.report.dropped_turns += reasons
        self.report.num_answers += len(places)
        return kept, places

    def _message(self, turn: Turn) -> dict[str, Any]:
        content = [
            {"type": "text", "text": value}
            if kind == "text"
            else {"type": "image", "image": self.images.relative(value)}
            for kind, value in turn.parts
        ]
        # As the trainer reads it: an answer counts unless it says otherwise.
        loss = {"loss": False} if turn.role == "assistant" and not turn.supervised else {}
        return {"role": turn.role, "content": content, **loss}


def _own_metadata(record: dict[str, Any]) -> dict[str, Any]:
    metadata = record.get("metadata")
    if not isinstance(metadata, dict):
        return {}
    check_unicode([json.dumps(metadata, ensure_ascii=False)])
    return dict(metadata)


def _weight(record: dict[str, Any]) -> float | None:
    weight = record["weight"]
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if weight is not None and not (is_number and 0 <= weight < 1e6):
        raise DropError("its weight is no number from 0 to 1e6")
    return weight


def _check_stated_size(record: dict[str, Any], size: tuple[int, int]) -> None:
    """Where the record states an image size, it must be the file's: else the coordinates mean another picture."""
    stated = record.get("image_size", record.get("img_size", [record.get("width"), record.get("height")]))
    is_size = isinstance(stated, list) and len(stated) == 2 and all(isinstance(side, int) for side in stated)
    if is_size and tuple(stated) != size:
        raise DropError("the stated image size is not the file's")


def convert_all(
    values: Iterator[tuple[Any, int]], converter: Converter, limit: int | None
) -> Iterator[tuple[dict, int]]:
    """Converted records with the bytes read so far, up to `limit` of them."""
    for value, position in values:
        if limit is not None and converter.report.num_written >= limit:
            return
        made = converter.convert(value)
        if made is not None:
            yield made, position
