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


def draw_walk(num_steps: int, seed: int = 0, rows: int = 4, cols: int = 5) -> list[Image.Image]:
    """Screenshots of one session: in each step a dialog opens, closes again, or a few words change."""
    rng = np.random.default_rng(seed)
    page = np.full((32 * rows, 32 * cols, 3), 240, dtype=np.uint8)
    for r, c in rng.integers((rows, cols), size=(rows, 2)):
        page[32 * r : 32 * r + 32, 32 * c : 32 * c + 32] = rng.integers(0, 256, (32, 32, 3))
    pictures = []
    for step in range(num_steps):
        shown = page.copy()
        if step % 3 == 1:
            shown[32 : 32 * rows - 32, 32 : 32 * cols - 32] = (250, 250, 210)
            shown[32:64, 32:64] = rng.integers(0, 256, (32, 32, 3))
        else:
            r, c = rng.integers((rows, cols))
            page[32 * r : 32 * r + 16, 32 * c : 32 * c + 16] = shown[:16, :16] = rng.integers(0, 256, 3)
        pictures.append(Image.fromarray(shown))
    return pictures


def walk_row(
    images: list, question: str = "What changed?", answer: str = "At (3, 4)", every_turn: bool = False
) -> dict:
    """A record of a session: an image a turn, each but the last answered with an action."""
    turns: list[dict] = []
    for number, image in enumerate(images):
        last = number == len(images) - 1
        text = question if last else f"Step {number}"
        turns.append({"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]})
        turns.append({"role": "assistant", "content": answer if last else f"click({number})"})
        if not last and not every_turn:
            turns[-1]["train"] = False
    return {"messages": turns}


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
