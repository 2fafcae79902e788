"""UI-Vision's element grounding as published -> evaluation records.

Fields (github.com/uivision/UI-Vision, eval/grounding/eval_uivision.py, commit 2b79355): image_path, image_size, bbox
(x1, y1, x2, y2, in either order), prompt_to_evaluate, platform, element_type. Three files, named
element_grounding_basic.json, ..._functional.json and ..._spatial.json; the final average is the mean of the three.
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
from data_tools.records import question_record
from pixelprune.answers import format_point

SUBSETS = ("basic", "functional", "spatial")


class UIVisionReader(BenchmarkReader):
    """The subset is the one that the file's name says, as all three have the same fields."""

    def make(self, entry: dict[str, Any], file: Path, number: int) -> dict[str, Any]:
        """Raises ValueError for a file that is named for no subset. Entries have no ids of their own."""
        named = [subset for subset in SUBSETS if file.stem.endswith(subset)]
        if not named:
            raise ValueError(f"{file}: expected element_grounding_{{{','.join(SUBSETS)}}}.json")
        name, instruction = text_of(entry, "image_path"), text_of(entry, "prompt_to_evaluate")
        size = self.images.size(name, has_coordinates=True)
        check_stated_size(entry.get("image_size"), size)
        a, b, c, d = numbers_of(entry.get("bbox"), "bbox", 4)
        box = box_in_image(min(a, c), min(b, d), max(a, c), max(b, d), size)
        metadata = {
            "source": "ui-vision",
            "subset": named[0],
            "bbox": box,
            "image_size": list(size),
            **{
                new: entry[old]
                for old, new in (("element_type", "element"), ("platform", "platform"))
                if entry.get(old)
            },
        }
        answer = format_point(*centre_of([(box[0], box[1]), (box[2], box[3])], size), size)
        record_id = f"{file.stem}-{number:05d}"
        return question_record(record_id, [self.images.relative(name)], instruction, answer, metadata)
