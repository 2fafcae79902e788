"""One corpus into the training format: conversations normalised, coordinates made relative, everything counted."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from data_tools.convert.dropped import DropError, check_unicode
from data_tools.convert.image_files import ImageFiles
from data_tools.convert.leniency import plain_row
from data_tools.convert.marked_places import rewrite_marked, rewrite_places
from data_tools.convert.turns import file_name, written_turn
from pixelprune.answers import Answer
from pixelprune.records.agents import strings_in
from pixelprune.records.keys import KeyRules
from pixelprune.records.objects import ObjectStyle, written
from pixelprune.records.reader import parse_record
from pixelprune.records.record import ImageRef, Message, ObjectMark, Record, RecordError


@dataclass(frozen=True)
class ConvertSettings:
    """How answers are read and written."""

    source: str
    coordinates: str | None = None
    """What numbers in answers mean (absolute, relative, fraction); None leaves answers as they are."""
    answer: str = "auto"
    keep_system: bool = True
    """Keep system turns. Corpora with absolute coordinates state a screen size there that is no longer true."""
    ignore_keys: tuple[str, ...] = ()
    """Keys of records that say nothing about training, as the trainer's data.ignore_keys; they are left out."""


@dataclass
class ConvertReport:
    """Counts of one conversion."""

    num_read: int = 0
    num_written: int = 0
    num_answers: int = 0
    dropped_records: Counter[str] = field(default_factory=Counter)
    """By reason: the reader's codes, as the trainer's quarantine has them, or words of the conversion."""
    dropped_turns: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    """The first record dropped under each reason, and what was wrong with it."""


class Converter:
    """Turns records into records of the training format; `report` counts what was left out and why."""

    def __init__(
        self, images: ImageFiles, settings: ConvertSettings, on_dropped: Callable[[dict[str, str]], None] | None = None
    ) -> None:
        """on_dropped: takes every record that is left out, in the words of the trainer's quarantine."""
        self.images = images
        self.on_dropped = on_dropped
        self.settings = settings
        self.rules = KeyRules.ignoring(settings.ignore_keys)
        self.report = ConvertReport()

    def convert(self, record: Any, where: str = "") -> dict[str, Any] | None:
        """The record in the training format, or None where it was dropped (and counted). where: its file and place."""
        number = self.report.num_read
        self.report.num_read += 1
        try:
            made = self._convert(record, number)
        except (DropError, RecordError) as error:
            reason = error.reason if isinstance(error, RecordError) else str(error)
            self.report.dropped_records[reason] += 1
            self.report.examples.setdefault(reason, f"record {number}: {error}")
            if self.on_dropped is not None:
                name = f"{self.settings.source}:{number}"
                self.on_dropped({"record": name, "file": where, "reason": reason, "detail": str(error)})
            return None
        self.report.num_written += 1
        return made

    def _convert(self, record: Any, number: int) -> dict[str, Any]:
        read = self._with_objects_written(parse_record(plain_row(record), rules=self.rules))
        turns = list(read.messages)
        record_id = record.get("id")
        name = f"{self.settings.source}-{number:08d}" if record_id is None else str(record_id)
        names = [file_name(image) for image in read.images]
        check_unicode([name, *names, *(message.text for message in turns)])
        with_coordinates = self.settings.coordinates is not None
        sizes = [self.images.size(name, has_coordinates=with_coordinates) for name in names]
        metadata = _own_metadata(read)
        metadata |= {"source": self.settings.source, "image_sizes": [list(size) for size in sizes]}
        if not self.settings.keep_system:
            turns = [turn for turn in turns if turn.role != "system"]
        if with_coordinates:
            if len(sizes) != 1:
                raise DropError("no image" if not sizes else "several images: coordinates could mean any")
            _check_stated_size(record, sizes[0])
            if read.tools or any(turn.template_fields or turn.role == "tool" for turn in turns):
                raise DropError("tools or reasoning, beside which coordinates are not rewritten")
            turns, places = self._relative(turns, sizes[0])
            metadata["image_size"] = list(sizes[0])
            if len(places) == 1:
                metadata.update(places[0])
        if not any(turn.role == "assistant" for turn in turns):
            raise DropError("no answer")
        weight = {"weight": read.weight} if record.get("weight") is not None else {}
        tools = {"tools": list(read.tools)} if read.tools else {}
        check_unicode(strings_in([read.tools, *(turn.template_fields for turn in turns)]))
        messages = [written_turn(turn, self._path) for turn in turns]
        return {"id": name, "messages": messages, "metadata": metadata, **weight, **tools}

    def _with_objects_written(self, record: Record) -> Record:
        has_objects = any(isinstance(part, ObjectMark) for turn in record.messages for part in turn.parts)
        if has_objects and self.settings.coordinates is not None:
            raise DropError("objects, which say themselves what their numbers mean: convert without --coordinates")

        def size_of(ref: ImageRef) -> tuple[int, int, int]:
            return (*self.images.size(file_name(ref), has_coordinates=True), 1)

        return written(record, size_of, ObjectStyle(self.settings.answer))

    def _relative(self, turns: list[Message], size: tuple[int, int]) -> tuple[list[Message], list[dict[str, Any]]]:
        """Keep the exchanges whose answer gives a place, and write it relative; the image stays in the first one."""
        assert self.settings.coordinates is not None
        kept: list[Message] = []
        asked: list[Message] = []
        places: list[dict[str, Any]] = []
        lost_images: tuple[ImageRef, ...] = ()
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
                    text, found = rewrite_places(turn.text, size, self.settings.coordinates, self.settings.answer)
                    asked = [self._with_marked_rewritten(question, size) for question in asked]
                except DropError as error:
                    reasons[str(error)] += 1
                    lost_images += tuple(
                        part for question in asked for part in question.parts if isinstance(part, ImageRef)
                    )
                else:
                    asked[0] = replace(asked[0], parts=lost_images + asked[0].parts)
                    lost_images = ()
                    kept += [*asked, replace(turn, parts=(text,))]
                    places += [_place_metadata(answer) for answer in found]
                asked = []
        if not places:
            raise DropError(reasons.most_common(1)[0][0] if reasons else "no answer")
        self.report.dropped_turns += reasons
        self.report.num_answers += len(places)
        return kept, places

    def _with_marked_rewritten(self, question: Message, size: tuple[int, int]) -> Message:
        """A question that names places means them as its answer does."""
        assert self.settings.coordinates is not None
        form = "auto"  # a question answers nothing
        parts = [
            rewrite_marked(part, size, self.settings.coordinates, form)[0] if isinstance(part, str) else part
            for part in question.parts
        ]
        return replace(question, parts=tuple(parts))

    def _path(self, image: ImageRef) -> str:
        return self.images.relative(file_name(image))


def _place_metadata(answer: Answer) -> dict[str, Any]:
    """Where an answer points, in pixels: what evaluation compares with."""
    place: dict[str, Any] = {"point": [round(side, 3) for side in answer.point or ()]}
    if answer.box is not None:
        place["bbox"] = [round(side, 3) for side in answer.box]
    return place


def _own_metadata(record: Record) -> dict[str, Any]:
    """What the record says beside its conversation; its id is written where it stood."""
    metadata = {key: value for key, value in record.metadata.items() if key != "id"}
    check_unicode([json.dumps(metadata, ensure_ascii=False)])
    return metadata


def _check_stated_size(record: dict[str, Any], size: tuple[int, int]) -> None:
    """Where the record states an image size, it must be the file's: else the coordinates mean another picture."""
    stated = record.get("image_size", record.get("img_size", [record.get("width"), record.get("height")]))
    is_size = isinstance(stated, list) and len(stated) == 2 and all(isinstance(side, int) for side in stated)
    if is_size and tuple(stated) != size:
        raise DropError("the stated image size is not the file's")


def convert_all(
    values: Iterator[tuple[Any, int]], converter: Converter, limit: int | None, path: Path
) -> Iterator[tuple[dict, int]]:
    """Converted records with the bytes read so far, up to `limit` of them; path: the file they come from."""
    for number, (value, position) in enumerate(values, start=1):
        if limit is not None and converter.report.num_written >= limit:
            return
        made = converter.convert(value, f"{path}, record {number}")
        if made is not None:
            yield made, position
