"""Synthetic screens for the convergence demonstration: coloured controls on a plain page, drawn by seed.

They are far simpler than screenshots, and small, so that a model of a few hundred thousand parameters can learn from
scratch within minutes on a CPU what a grounding model learns in days: find the named control and say where it is.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from pixelprune.answers import format_point

CELL = 32
COLOURS = {
    "red": (214, 40, 40),
    "green": (30, 150, 60),
    "blue": (30, 80, 220),
    "yellow": (240, 200, 20),
    "purple": (130, 40, 170),
    "orange": (245, 130, 30),
    "cyan": (20, 190, 200),
    "pink": (250, 120, 180),
}
SHAPES = ("button", "circle", "triangle")
"""A button is two cells wide and carries a word ("text"), the others one cell ("icon")."""
PAGES = ((250, 250, 250), (232, 236, 240), (40, 44, 52), (255, 248, 230))
WORDS = ("Save", "Send", "Open", "Next", "Help", "Edit")

Box = tuple[int, int, int, int]


def draw_screen(seed: int, *, side: int, num_controls: int) -> tuple[Image.Image, list[tuple[str, str, Box]]]:
    """A square page of `side` pixels and its controls: (name, text or icon, box x1, y1, x2, y2 in pixels).

    No two controls of a page share a colour or a cell; a strip of a cell at the top is the title bar.
    """
    rng = np.random.default_rng(seed)
    page = PAGES[rng.integers(len(PAGES))]
    image = Image.new("RGB", (side, side), page)
    draw = ImageDraw.Draw(image)
    ink = (70, 76, 90) if sum(page) > 380 else (190, 196, 210)
    draw.rectangle((0, 0, side, CELL - 1), fill=(90, 100, 130))
    draw.text((8, 10), "Demo", fill=(240, 240, 240))
    cells = side // CELL
    free = np.zeros((cells, cells), dtype=bool)
    free[1:] = True
    controls = []
    for colour in rng.permutation(list(COLOURS))[:num_controls]:
        shape = SHAPES[rng.integers(len(SHAPES))]
        width = 2 if shape == "button" else 1
        fits = free[:, :-1] & free[:, 1:] if width == 2 else free
        row, col = (int(i) for i in rng.choice(np.argwhere(fits)))
        free[row, col : col + width] = False
        left, top = col * CELL + 3, row * CELL + 3
        box = (left, top, left + width * CELL - 6, top + CELL - 6)
        _draw_control(draw, shape, box, COLOURS[colour], WORDS[rng.integers(len(WORDS))])
        controls.append((f"{colour} {shape}", "text" if shape == "button" else "icon", box))
    # A line of body text somewhere: not all that is kept is a control.
    row, col = rng.choice(np.argwhere(free))
    for line in range(3):
        top = row * CELL + 6 + 8 * line
        draw.line((col * CELL + 3, top, col * CELL + int(rng.integers(14, 29)), top), fill=ink, width=2)
    return image, controls


def write_screens(folder: Path, name: str, seeds: range, *, side: int, num_controls: int) -> Path:
    """Pages as PNG and one record per control in folder/NAME.jsonl, in the training format; returns that path.

    Pages have 1 to num_controls controls in turn: where a thing is can be learned before which of them is meant.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.jsonl"
    with path.open("w") as file:
        for seed in seeds:
            image, controls = draw_screen(seed, side=side, num_controls=1 + seed % num_controls)
            file_name = f"images/{name}-{seed:05d}.png"
            image.save(folder / file_name, compress_level=1)
            for number, (label, element, box) in enumerate(controls):
                point = format_point((box[0] + box[2]) / 2, (box[1] + box[3]) / 2, (side, side))
                content = [{"type": "image", "image": file_name}, {"type": "text", "text": f"Click the {label}."}]
                record = {
                    "id": f"{name}-{seed:05d}-{number}",
                    "messages": [
                        {"role": "user", "content": content},
                        {"role": "assistant", "content": [{"type": "text", "text": point}]},
                    ],
                    "metadata": {"bbox": box, "image_size": [side, side], "element": element, "subset": name},
                }
                file.write(json.dumps(record) + "\n")
    return path


def _draw_control(draw: ImageDraw.ImageDraw, shape: str, box: Box, colour: tuple[int, int, int], word: str) -> None:
    x1, y1, x2, y2 = box
    if shape == "circle":
        draw.ellipse(box, fill=colour)
    elif shape == "triangle":
        draw.polygon([((x1 + x2) // 2, y1), (x2, y2), (x1, y2)], fill=colour)
    else:
        draw.rounded_rectangle(box, radius=5, fill=colour)
        draw.text((x1 + 14, y1 + 7), word, fill=(255, 255, 255))
