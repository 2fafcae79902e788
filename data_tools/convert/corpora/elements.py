"""Screenshots with annotated elements -> a conversation each: an instruction, the place of its element, and so on.

SeeClick (github.com/njucckevin/SeeClick, readme_data.md, commit 0ef37ac): img_filename, `elements` of instruction, bbox
and data_type, or instruction and bbox in the entry itself. OS-Atlas's grounding files have the same fields, as far as
public readers of them show.
ShowUI (github.com/showlab/ShowUI, TRAIN.md, commit 21ed7cb): img_url, img_size, `element` of instruction, bbox, point
and data_type.

Coordinates are fractions of the image: left, top, right, bottom, and x, y.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from data_tools.convert.benchmarks.reader import check_stated_size, text_of
from data_tools.convert.corpora.reader import CorpusReader
from data_tools.convert.dropped import DropError, check_unicode
from data_tools.convert.image_files import ImageFiles
from pixelprune.answers import format_box, format_point


class ElementsReader(CorpusReader):
    """One conversation per screenshot, so that its image is encoded once for all its elements."""

    def __init__(self, images: ImageFiles, source: str, *, answer: str = "point") -> None:
        """answer: point (the entry's own, else the centre of the box) or box."""
        super().__init__(images, source)
        self.answer = answer

    def make(self, entry: dict[str, Any], file: Path, number: int) -> dict[str, Any]:
        """The conversation. An element that is not usable is left out of it and counted."""
        key = next((key for key in ("elements", "element") if key in entry), None)
        elements = entry[key] if key else [entry]
        if not isinstance(elements, list) or not elements:
            raise DropError("no elements")
        name = self.find_image(text_of(entry, "img_url" if "img_url" in entry else "img_filename"))
        size = self.images.size(name, has_coordinates=True)
        check_stated_size(entry.get("img_size"), size)
        messages: list[dict[str, Any]] = []
        boxes, kinds = [], []
        for element in elements:
            try:
                instruction, box, answer = self._exchange(element, size)
                check_unicode([instruction])
            except DropError as error:
                self.dropped_parts[str(error)] += 1
                continue
            image = [] if messages else [{"type": "image", "image": self.images.relative(name)}]
            messages.append({"role": "user", "content": [*image, {"type": "text", "text": instruction}]})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
            boxes.append(box)
            kinds.append(element.get("data_type"))
        if not messages:
            raise DropError("no element can be used")
        metadata: dict[str, Any] = {"source": self.source, "image_size": list(size)}
        metadata |= {"bbox": boxes[0]} if len(boxes) == 1 else {"bboxes": boxes}
        if len(kinds) == 1 and isinstance(kinds[0], str):
            metadata["element"] = kinds[0]
        return {"id": self.record_id(entry, file, number), "messages": messages, "metadata": metadata}

    def _exchange(self, element: Any, size: tuple[int, int]) -> tuple[str, list[float], str]:
        if not isinstance(element, dict):
            raise DropError("not a JSON object")
        instruction = text_of(element, "instruction")
        x1, y1, x2, y2 = _fractions(element.get("bbox"), 4, "bbox")
        if x2 <= x1 or y2 <= y1:
            raise DropError("empty box")
        width, height = size
        box = (x1 * width, y1 * height, x2 * width, y2 * height)
        if self.answer == "box":
            answer = format_box(box, size)
        else:
            has_point = element.get("point") is not None
            x, y = _fractions(element["point"], 2, "point") if has_point else ((x1 + x2) / 2, (y1 + y2) / 2)
            answer = format_point(x * width, y * height, size)
        return instruction, [round(side, 3) for side in box], answer


def _fractions(value: Any, count: int, what: str) -> list[float]:
    is_list = isinstance(value, list) and len(value) == count
    if not is_list or not all(type(side) in (int, float) and math.isfinite(side) for side in value):
        raise DropError(f"{what} is not {count} numbers")
    if not all(0 <= side <= 1 for side in value):
        raise DropError(f"{what} is outside the image, or no fractions of it")
    return [float(side) for side in value]
