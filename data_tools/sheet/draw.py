"""A sheet a person can check: random records, with box, answer's point and words drawn on the image."""

from __future__ import annotations

import random
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from data_tools.records import first_image
from pixelprune.answers import parse_answer
from pixelprune.images.image import open_image
from pixelprune.images.image_file import open_regular

_CELL = (620, 420)
_CAPTION = 74
_BOX = (230, 20, 60)
_POINT = (20, 90, 255)


def draw_record(record: dict[str, Any], folder: Path, point: tuple[float, float] | None) -> Image.Image:
    """One cell: the part of the image around the box, box in red, point in blue, instruction and answer below.

    point: the answer in pixels of the image, or None where it could not be read.
    """
    name = first_image(record)
    if name is None:
        raise ValueError(f"record {record.get('id')!r} has no image")
    try:
        with open_regular(folder / name) as file:
            image = open_image(file, name).convert("RGB")
    except (OSError, ValueError) as error:
        raise ValueError(f"record {record.get('id')!r}: image {folder / name} cannot be drawn: {error}") from error
    box = record.get("metadata", {}).get("bbox")
    width, height = image.size
    scale = min(_CELL[0] / width, (_CELL[1] - _CAPTION) / height)
    # A tall page would be a thread in its cell: cut to the part around what is asked for, at a readable scale.
    view = (0.0, 0.0, float(width), float(height))
    if scale < 0.5:
        scale = 0.5
        w, h = min(width, _CELL[0] / scale), min(height, (_CELL[1] - _CAPTION) / scale)
        cx, cy = _centre(box) or point or (width / 2, height / 2)
        left, top = min(max(cx - w / 2, 0), width - w), min(max(cy - h / 2, 0), height - h)
        view = (left, top, left + w, top + h)
    shown = image.resize((round((view[2] - view[0]) * scale), round((view[3] - view[1]) * scale)), box=view)
    cell = Image.new("RGB", _CELL, (250, 250, 250))
    cell.paste(shown, (0, 0))
    draw = ImageDraw.Draw(cell)

    def place(x: float, y: float) -> tuple[float, float]:
        return (x - view[0]) * scale, (y - view[1]) * scale

    if box:
        (x1, y1), (x2, y2) = place(box[0], box[1]), place(box[2], box[3])
        draw.rectangle((x1 - 2, y1 - 2, x2 + 2, y2 + 2), outline=_BOX, width=2)  # around it, so that it hides nothing
    if point:
        x, y = place(*point)
        draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=_POINT, outline=(255, 255, 255))
    draw.rectangle((0, _CELL[1] - _CAPTION, *_CELL), fill=(250, 250, 250))
    text = f"{_texts(record)}\n{record.get('id', '')}"
    lines = [line for part in text.split("\n") for line in textwrap.wrap(part, 92)][:5]
    draw.multiline_text((6, _CELL[1] - _CAPTION + 4), "\n".join(lines), fill=(20, 20, 20), font=_font(12), spacing=1)
    return cell


def _centre(box: Sequence[float] | None) -> tuple[float, float] | None:
    return ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2) if box else None


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _texts(record: dict[str, Any]) -> str:
    parts = []
    for message in record["messages"]:
        content = message["content"]
        texts = [content] if isinstance(content, str) else [p["text"] for p in content if p.get("type") == "text"]
        parts.append(("-> " if message["role"] == "assistant" else "") + " ".join(texts))
    return "\n".join(parts)


def _draw_lots(records: Iterable[dict[str, Any]], count: int, rng: random.Random) -> list[dict[str, Any]]:
    """`count` of the records that have an image, each as likely; holds no more than these in memory."""
    chosen: list[dict[str, Any]] = []
    num_seen = 0
    for record in records:
        if first_image(record) is None:
            continue
        num_seen += 1
        place = num_seen - 1 if len(chosen) < count else rng.randrange(num_seen)
        if place < count:
            chosen[place : place + 1] = [record]
    return chosen


def make_sheet(
    records: Iterable[dict[str, Any]], folder: Path, out: Path, *, count: int = 24, columns: int = 4, seed: int = 0
) -> int:
    """Draw `count` random records that have an image onto one PNG. Returns how many were drawn.

    folder: what image paths are relative to. Raises ValueError when no record has an image or count is below 1.
    """
    if count < 1 or columns < 1:
        raise ValueError(f"sheet: expected 1 or more records and columns, got {count} and {columns}")
    chosen = _draw_lots(records, count, random.Random(seed))
    if not chosen:
        raise ValueError("sheet: no record with an image")
    columns = min(columns, len(chosen))
    rows = -(-len(chosen) // columns)
    sheet = Image.new("RGB", (columns * (_CELL[0] + 8) + 8, rows * (_CELL[1] + 8) + 8), (200, 205, 212))
    for index, record in enumerate(chosen):
        name = first_image(record)
        assert name is not None
        with open_regular(folder / name) as file:
            size = open_image(file, name).size
        answer = parse_answer(_texts({"messages": record["messages"][1:]}).removeprefix("-> "), image_size=size)
        cell = draw_record(record, folder, answer.point)
        sheet.paste(cell, (8 + (index % columns) * (_CELL[0] + 8), 8 + (index // columns) * (_CELL[1] + 8)))
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(out, optimize=True)
    return len(chosen)
