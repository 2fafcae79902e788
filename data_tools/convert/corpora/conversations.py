"""Conversations of agents, whose answers hold thoughts and actions -> records with every place relative 0-1000.

AGUVIS (github.com/xlang-ai/aguvis, src/aguvis/dataset.py and src/aguvis/constants.py, commit 178c418): image (one or
several), conversations of from, value, recipient and end_turn; places are fractions in pyautogui, mobile and browser
calls.
GUI-Actor (github.com/microsoft/GUI-Actor, src/gui_actor/dataset.py, commit d98d1bb): the same, and bbox_gt, the box
that the action lies in, as fractions.
OS-Atlas (github.com/OS-Copilot/OS-Atlas, eval/data/*.jsonl, commit bad0840): id, image, conversations of from and
value; places are relative 0-1000, as <point>[[x,y]]</point> behind the words of the action.

Words stay: a prompt says in which form its actions are. An answer without a place (a key, a text to type) stays as it
is. Turns of the assistant that follow each other (a thought for `all`, an action for `os`) are one turn.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from data_tools.convert.corpora.calls import rewrite_calls
from data_tools.convert.corpora.reader import CorpusReader
from data_tools.convert.dropped import DropError
from data_tools.convert.image_files import ImageFiles
from data_tools.convert.leniency import plain_row
from data_tools.convert.marked_places import rewrite_marked
from data_tools.convert.turns import file_name, written_turn
from pixelprune.records.keys import NO_RULES
from pixelprune.records.reader import parse_record
from pixelprune.records.record import ImageRef, RecordError

_OF_THE_TURN = ("recipient", "end_turn", "bbox_gt")


class ConversationReader(CorpusReader):
    """Conversations with places in their answers."""

    def __init__(self, images: ImageFiles, source: str, *, calls: bool) -> None:
        """calls: places are fractions in pointer calls; otherwise relative 0-1000 between tags, where they may stay."""
        super().__init__(images, source)
        self.calls = calls

    def make(self, entry: dict[str, Any], file: Path, number: int) -> dict[str, Any]:
        turns, boxes = _joined(entry.get("conversations"))
        row = {key: value for key, value in entry.items() if key != "conversations"} | {"conversations": turns}
        try:
            record = parse_record(plain_row(row), rules=NO_RULES)
        except RecordError as error:
            raise DropError(error.reason) from error
        if any(not isinstance(part, str | ImageRef) for message in record.messages for part in message.parts):
            raise DropError("objects beside the places of answers")
        names = [self._name(image) for image in record.images]
        if not names:
            raise DropError("no image")
        sizes = [self.images.size(name, has_coordinates=True) for name in names]
        found, num_shown = list[list[float]](), 0
        messages = []
        for message in record.messages:
            num_shown += sum(isinstance(part, ImageRef) for part in message.parts)
            if message.role == "assistant":
                # The screenshot that an action is for is the last one shown before it.
                text, places = self._with_places(message.text, sizes[max(num_shown - 1, 0)])
                found += places
                message = replace(message, parts=(text,))
            messages.append(written_turn(message, self._path))
        metadata: dict[str, Any] = {"source": self.source, "image_sizes": [list(size) for size in sizes]}
        metadata |= _place_of(found, boxes, sizes)
        more: dict[str, Any] = {"weight": record.weight} if record.weight != 1 else {}
        more |= {"tools": list(record.tools)} if record.tools else {}
        return {"id": self.record_id(entry, file, number), "messages": messages, "metadata": metadata, **more}

    def _with_places(self, text: str, size: tuple[int, int]) -> tuple[str, list[list[float]]]:
        if self.calls:
            return rewrite_calls(text, size, "fraction")
        answers = rewrite_marked(text, size, "relative", "auto")[1]
        return text, [[round(side, 3) for side in answer.box or answer.point or ()] for answer in answers]

    def _name(self, image: ImageRef) -> str:
        return self.find_image(file_name(image))

    def _path(self, image: ImageRef) -> str:
        return self.images.relative(self._name(image))


def _joined(turns: Any) -> tuple[list[Any], list[Any]]:
    """The turns, with those of the assistant that follow each other as one; and the boxes of the actions."""
    if not isinstance(turns, list):
        raise DropError("conversations is no list")
    joined, boxes = list[Any](), []
    for turn in turns:
        if not isinstance(turn, dict):
            raise DropError("a turn is no object")
        if turn.get("bbox_gt") is not None:
            boxes.append(turn["bbox_gt"])
        turn = {key: value for key, value in turn.items() if key not in _OF_THE_TURN}
        before = joined[-1] if joined else {}
        texts = (before.get("value"), turn.get("value"))
        is_both = before.get("from") == turn.get("from") == "gpt" and all(isinstance(text, str) for text in texts)
        if is_both and before.keys() == turn.keys() == {"from", "value"}:
            before["value"] = f"{before['value'].rstrip()}\n{turn['value']}"
        else:
            joined.append(turn)
    return joined, boxes


def _place_of(found: list[list[float]], boxes: list[Any], sizes: list[tuple[int, int]]) -> dict[str, Any]:
    """The one place of a record about one image, for evaluation and the sheet; {} where there is no such thing."""
    if len(sizes) != 1:
        return {}
    place: dict[str, Any] = {"image_size": list(sizes[0])}
    if len(found) == 1:
        place["point" if len(found[0]) == 2 else "bbox"] = found[0]
    is_box = len(boxes) == 1 and isinstance(boxes[0], list) and len(boxes[0]) == 4
    if is_box and all(type(side) in (int, float) and 0 <= side <= 1 for side in boxes[0]):
        place["bbox"] = [round(side * sizes[0][i % 2], 3) for i, side in enumerate(boxes[0])]
    return place
