"""Results to look at: one HTML file of cells and records, misses first, with what was seen, asked for and answered."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pixelprune.command.page import build_page, embedded_picture, omitted_runs
from pixelprune.files import write_whole
from pixelprune.images.image import ImageError, decode_image, prune_pixels, resize_image
from pixelprune.prompter import Prompter
from pixelprune.records.images import read_image
from pixelprune.records.record import ImageRef
from pixelprune.selection.registry import is_in_time
from pixelprune.settings import PruneSettings, ResizeSettings
from training.evaluation.answering import Task
from training.evaluation.scoring import Prediction
from training.evaluation.table_files import Cell

logger = logging.getLogger(__name__)

PAGE_FILE = "results.html"
MAX_PICTURES = 3
"""Images shown of a record that asks for no place; a document may have a hundred."""


@dataclass(frozen=True)
class ShownPass:
    """One row's answers to one data file. tasks and predictions: in the same order; cells: benchmark -> its figures."""

    row: str
    prompter: Prompter
    tasks: Sequence[Task]
    predictions: Sequence[Prediction]
    cells: dict[str, Cell]


@dataclass
class _Record:
    """A record and every row's answer to it."""

    task: Task
    benchmark: str
    given: dict[str, tuple[Prediction, Prompter]] = field(default_factory=dict)

    @property
    def num_misses(self) -> int:
        return sum(prediction.score not in (1, None) for prediction, _ in self.given.values())


def write_results_page(path: Path, title: str, passes: Sequence[ShownPass], max_records: int) -> None:
    """Write the page with up to max_records records: those that most rows missed first, evenly from all benchmarks.

    A record whose image cannot be read by now stands there without it, with the reason.
    """
    records = _chosen(_records(passes), max_records)
    rows = list(dict.fromkeys(one.row for one in passes))
    cells = [{"row": one.row, "benchmark": name, **vars(cell)} for one in passes for name, cell in one.cells.items()]
    num_all = len({(prediction.benchmark, prediction.id) for one in passes for prediction in one.predictions})
    data = {
        "title": title,
        "facts": [
            f"{len(records)} of {num_all} records on this page, most-missed first",
            "red: asked for",
            "blue: answered",
        ],
        "rows": rows,
        "benchmarks": list(dict.fromkeys(cell["benchmark"] for cell in cells)),
        "cells": cells,
        "records": [_shown(record) for record in records],
    }
    folder = Path(__file__).parent
    script, style = ((folder / f"results_page.{kind}").read_text() for kind in ("js", "css"))
    write_whole(path, build_page(title, data, script, style))


def _records(passes: Sequence[ShownPass]) -> list[_Record]:
    records: dict[tuple[str, str], _Record] = {}
    for one in passes:
        only = next(iter(one.cells)) if len(one.cells) == 1 else ""
        for task, prediction in zip(one.tasks, one.predictions, strict=True):
            benchmark = prediction.benchmark or only
            record = records.setdefault((benchmark, task.id), _Record(task, benchmark))
            record.given[one.row] = prediction, one.prompter
    return list(records.values())


def _chosen(records: list[_Record], max_records: int) -> list[_Record]:
    """Benchmarks take turns, each giving what most rows missed, spread over the records that are missed as often."""
    by_benchmark: dict[str, list[_Record]] = {}
    for record in records:
        by_benchmark.setdefault(record.benchmark, []).append(record)
    queues = []
    for own in by_benchmark.values():
        levels = sorted({record.num_misses for record in own}, reverse=True)
        queue: list[_Record] = []
        for level in levels:
            alike, room = [record for record in own if record.num_misses == level], max_records - len(queue)
            step = max(1.0, len(alike) / room) if room > 0 else 1.0
            queue += [alike[int(i * step)] for i in range(min(room, len(alike)))]
        queues.append(queue)
    chosen: list[_Record] = []
    for turn in range(max_records):
        chosen += [queue[turn] for queue in queues if turn < len(queue)]
    return chosen[:max_records]


def _shown(record: _Record) -> dict[str, Any]:
    task, target = record.task, record.task.target
    messages = task.record.messages
    question = next((message.text for message in reversed(messages) if message.role == "user"), "")
    images = task.record.images
    is_place = target.scorer == "place"
    refs = images[-1:] if is_place else images[:MAX_PICTURES]
    pictures: list[tuple[Image.Image, ImageRef]] = []
    problem = ""
    resize = next(iter(record.given.values()))[1].resize
    try:
        pictures = [(decode_image(read_image(ref, task.root), resize), ref) for ref in refs]
    except ValueError as error:
        problem = f"no picture: {error}"
        logger.warning("results page: %s is shown without its image: %s", task.id, error)
    sizes = _Sizes(pictures)
    return {
        "id": task.id,
        "source_id": target.source_id,
        "benchmark": record.benchmark,
        "subset": target.subset if target.subset != target.benchmark else "",
        "kind": target.element,
        "question": question,
        "system": next((message.text for message in messages if message.role == "system"), ""),
        "asked_for": _asked_for(task),
        "box": target.box,
        "polygon": target.polygon,
        "files": [ref.source for ref in refs if isinstance(ref.source, str)],
        "pictures": [{"source": embedded_picture(picture), "size": picture.size} for picture, _ in pictures],
        "place_on": len(pictures) - 1 if is_place else None,
        "num_pictures": 1 if is_place else len(images),
        "no_picture": problem,
        "given": {
            row: _given(prediction, prompter) | {"masks": _masks(prompter, sizes, task, refs)}
            for row, (prediction, prompter) in record.given.items()
        },
    }


def _asked_for(task: Task) -> str:
    target = task.target
    if target.is_refusal:
        return "no such place: (-1, -1)"
    if target.scorer == "place":
        corners = [target.box[:2], target.box[2:]] if target.box else target.polygon
        return " to ".join(f"({x:g}, {y:g})" for x, y in corners) + " px"
    options = [f"{chr(ord('A') + number)}. {option}" for number, option in enumerate(target.options)]
    named = [
        option for option in options if option[0] in {reference.strip().upper() for reference in target.references}
    ]
    return "\n".join(named or target.references)


class _Sizes:
    """Pictures as models see them, each resized once for all rows with the same limits; None where it cannot be."""

    def __init__(self, pictures: Sequence[tuple[Image.Image, ImageRef]]) -> None:
        self._pictures = pictures
        self._seen: dict[ResizeSettings, list[np.ndarray | None]] = {}

    def of(self, resize: ResizeSettings) -> list[np.ndarray | None]:
        if resize not in self._seen:
            self._seen[resize] = [self._resized(picture, ref, resize) for picture, ref in self._pictures]
        return self._seen[resize]

    @staticmethod
    def _resized(picture: Image.Image, ref: ImageRef, resize: ResizeSettings) -> np.ndarray | None:
        try:
            return resize_image(picture, resize, ref.wish)
        except ImageError:  # the prediction says so, as its failure
            return None


def _given(prediction: Prediction, prompter: Prompter) -> dict[str, Any]:
    return {
        "text": prediction.text,
        "score": prediction.score,
        "problem": prediction.problem,
        "error": prediction.error,
        "point": prediction.point,
        "kept": prediction.kept_blocks,
        "full": prediction.full_blocks,
    }


def _masks(prompter: Prompter, sizes: _Sizes, task: Task, refs: Sequence[ImageRef]) -> list[dict[str, Any] | None]:
    """Of each picture that is shown (`refs` of the record's images); with pred3d all of the record are looked at."""
    if prompter.prune.strategy == "none":
        return []
    seen, images = sizes.of(prompter.resize), task.record.images
    if not is_in_time(prompter.prune):
        return [_mask(image, prompter.prune) for image in seen]
    try:
        pruned = prompter.prune_images([replace(ref, source=read_image(ref, task.root)) for ref in images])
    except ValueError:  # one that is not shown cannot be read by now
        return [None for _ in seen]
    shown = slice(-1, None) if len(refs) == 1 else slice(len(seen))
    return [omitted_runs(image.selection.keep) for image in pruned[shown]]


def _mask(image: np.ndarray | None, prune: PruneSettings) -> dict[str, Any] | None:
    """Omitted blocks of a resized image."""
    if image is None:
        return None
    return omitted_runs(prune_pixels(image, prune, image.shape[:2]).selection.keep)
