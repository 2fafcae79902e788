"""OSWorld-G as published -> evaluation records: boxes, polygons, and things that are not there.

Fields of benchmark/OSWorld-G.json and OSWorld-G_refined.json of github.com/xlang-ai/OSWorld-G, as two readers of them
agree (github.com/Onifin/Holo3.1-OSWorld-G, evaluation/holo_osworld_g.py, commit da9ab94;
github.com/EvolvingLMMs-Lab/lmms-eval, lmms_eval/tasks/osworld_g/utils.py, commit 18b594d): id, image_path, image_size,
instruction, box_type (bbox, polygon, refusal), box_coordinates (x, y, width, height, or the corners x, y, x, y, ...),
GUI_types. The hub's Parquet has the same columns and the picture; a click at two negative numbers refuses.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_tools.convert.benchmarks.reader import (
    BenchmarkReader,
    box_in_image,
    centre_of,
    check_stated_size,
    numbers_of,
    text_of,
)
from data_tools.convert.dropped import DropError
from data_tools.records import question_record
from pixelprune.answers import format_point

REFUSAL = "(-1, -1)"
"""How evaluation reads that there is no such thing; the prompt preset point_or_refuse says so."""


class OSWorldGReader(BenchmarkReader):
    """The refined instructions are a benchmark of their own, told by the file's name."""

    hub_names = {"image": "image_path"}  # noqa: RUF012

    def make(self, entry: dict[str, Any], file: Path, number: int) -> dict[str, Any]:
        """The published score is a mean over all entries, so that the type of target is a kind and no subset."""
        name, instruction, kind = (text_of(entry, key) for key in ("image_path", "instruction", "box_type"))
        size = self.images.size(name, has_coordinates=True)
        check_stated_size(entry.get("image_size"), size)
        place: dict[str, Any]
        if kind == "refusal":
            place, answer = {"refusal": True}, REFUSAL
        elif kind == "bbox":
            x, y, width, height = numbers_of(entry.get("box_coordinates"), "box_coordinates", 4)
            box = box_in_image(x, y, x + width, y + height, size)
            place = {"bbox": box}
            answer = format_point(*centre_of([(box[0], box[1]), (box[2], box[3])], size), size)
        elif kind == "polygon":
            sides = numbers_of(entry.get("box_coordinates"), "box_coordinates")
            if len(sides) < 6 or len(sides) % 2:
                raise DropError("polygon is not three or more corners")
            corners = list(zip(sides[::2], sides[1::2], strict=True))
            place = {"polygon": [list(corner) for corner in corners]}
            answer = format_point(*centre_of(corners, size), size)
        else:
            raise DropError("box_type is none of bbox, polygon, refusal")
        metadata = {
            "source": "osworld-g-refined" if "refined" in file.stem.lower() else "osworld-g",
            "element": kind,
            "image_size": list(size),
            **place,
        }
        if entry.get("GUI_types"):
            metadata["gui_types"] = entry["GUI_types"]
        record_id = str(entry.get("id") or f"{file.stem}-{number:05d}")
        return question_record(record_id, [self.images.relative(name)], instruction, answer, metadata)
