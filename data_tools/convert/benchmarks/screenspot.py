"""ScreenSpot v2 and ScreenSpot Pro as published (JSON annotations beside an image folder) -> evaluation records.

Fields, v2 (entries of OS-Copilot/ScreenSpot-v2, as github.com/open-compass/VLMEvalKit,
vlmeval/dataset/GUI/screenspot_v2.py, commit 516d2ba, quotes them; those of the first ScreenSpot,
github.com/njucckevin/SeeClick, pretrain/screenspot_test.py, commit 661ff1b): img_filename, bbox [x, y, width, height],
instruction, data_type (text, icon), data_source.
Fields, Pro (github.com/likaixin2000/ScreenSpot-Pro-GUI-Grounding, eval_screenspot_pro.py, commit 588f1f2):
img_filename, bbox [x1, y1, x2, y2], instruction, img_size [width, height], ui_type (text, icon), group, application,
platform, id; instruction_cn is the Chinese instruction.
Copies on the hub differ in what their four numbers mean, so Parquet is not read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_tools.convert.benchmarks.reader import BenchmarkReader, box_in_image, check_stated_size, numbers_of
from data_tools.convert.dropped import DropError
from data_tools.convert.image_files import ImageFiles
from data_tools.records import grounding_record
from pixelprune.answers import format_point

_V2_SUBSETS = {
    "windows": "desktop",
    "macos": "desktop",
    "linux": "desktop",
    "ios": "mobile",
    "android": "mobile",
}


def variant_of(entry: dict[str, Any]) -> str:
    """v2 or pro, by the field that tells text from icon. Raises DropError when neither is there."""
    if "ui_type" in entry:
        return "pro"
    if "data_type" in entry:
        return "v2"
    raise DropError("neither data_type (v2) nor ui_type (pro)")


def box_of(entry: dict[str, Any], variant: str) -> tuple[float, float, float, float]:
    """The box as (x1, y1, x2, y2), pixels. Raises DropError for what is no box."""
    a, b, c, d = numbers_of(entry.get("bbox"), "bbox", 4)
    x1, y1, x2, y2 = (a, b, a + c, b + d) if variant == "v2" else (a, b, c, d)
    if x2 <= x1 or y2 <= y1:
        raise DropError("empty box")
    return x1, y1, x2, y2


class ScreenSpotReader(BenchmarkReader):
    """language: `en` or `cn` (Pro only). Boxes are kept as published; one that misses its image is dropped."""

    def __init__(self, images: ImageFiles, *, variant: str = "auto", language: str = "en") -> None:
        super().__init__(images)
        self.variant = variant
        self.language = language

    def make(self, entry: dict[str, Any], file: Path, number: int) -> dict[str, Any]:
        """v2 has no ids: its entries are named by file and place."""
        variant = variant_of(entry) if self.variant == "auto" else self.variant
        name = entry.get("img_filename")
        instruction = entry.get("instruction_cn" if self.language == "cn" else "instruction")
        kind = entry.get("ui_type" if variant == "pro" else "data_type")
        if not isinstance(name, str) or not isinstance(instruction, str) or not instruction.strip():
            raise DropError("img_filename or instruction missing")
        if kind not in ("text", "icon"):
            raise DropError("element type is neither text nor icon")
        x1, y1, x2, y2 = box_of(entry, variant)
        width, height = self.images.size(name, has_coordinates=True)
        check_stated_size(entry.get("img_size"), (width, height))
        box = box_in_image(x1, y1, x2, y2, (width, height))
        if variant == "pro":
            subset = str(entry.get("group", "unknown"))
            extra: dict[str, Any] = {key: entry[key] for key in ("application", "platform") if key in entry}
        else:
            source = str(entry.get("data_source", "unknown")).lower()
            subset = _V2_SUBSETS.get(source, "web")
            extra = {"data_source": source}
        metadata = {
            "source": f"screenspot-{variant}",
            "subset": subset,
            "bbox": box,
            "image_size": [width, height],
            "element": kind,
            **extra,
        }
        centre = min(max((x1 + x2) / 2, 0), width), min(max((y1 + y2) / 2, 0), height)
        answer = format_point(*centre, (width, height))
        record_id = str(entry.get("id") or f"{file.stem}-{number:05d}")
        return grounding_record(record_id, self.images.relative(name), instruction.strip(), answer, metadata)
