"""Small pictures, rows and files that the tests of the data path are made of."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image


def draw_screen(seed: int, width: int = 192, height: int = 128) -> Image.Image:
    """A flat page with a few noisy boxes: some blocks repeat, some do not."""
    rng = np.random.default_rng(seed)
    pixels = np.full((height, width, 3), 240, dtype=np.uint8)
    for _ in range(3):
        top, left = rng.integers(0, height - 24), rng.integers(0, width - 40)
        pixels[top : top + 24, left : left + 40] = rng.integers(0, 255, (24, 40, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encode(picture: Image.Image, picture_format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, picture_format, **options)
    return buffer.getvalue()


def chat_row(image: str | None, question: str = "Where is it?", answer: str = "At (3, 4)") -> dict:
    parts = [] if image is None else [{"type": "image", "image": image}]
    return {
        "messages": [
            {"role": "user", "content": [*parts, {"type": "text", "text": question}]},
            {"role": "assistant", "content": answer},
        ]
    }


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path
