"""Drawn sessions that a toy model learns within a minute, and what is asked about each: small, and made by seed.

A screenshot is a plain page of ROWS x COLUMNS blocks: a red disc in the first row, a blue triangle in the second, a
dialog of one of four colours in the third, lines of text in cells that are left. Between the first screenshot and the
last the disc moves, the dialog is closed and a pink badge is opened, in any order, a screenshot each; the triangle and
the text never change. The answer has a word for each task, in one order for all records.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from benchmarks.parts.screens import COLOURS, PAGES
from pixelprune.settings import BLOCK

ROWS, COLUMNS = 3, 4
PLACES = "abcd"
DIALOGS = ("green", "yellow", "purple", "orange")
ACTIONS = ("moved", "closed", "opened")
TASKS = {
    "now": "column of the disc on the last screenshot",
    "still": "column of the triangle, which never changed",
    "gone": "colour of the dialog that was closed",
    "changed": "what the last action did",
}
"""Name of a task -> what its word in the answer says."""
CHANCE = {"now": 1 / 4, "still": 1 / 4, "gone": 1 / 4, "changed": 1 / 3}
_INK = (120, 125, 135)
Shapes = dict[str, tuple[int, int, str]]
"""What stands on a page: shape -> row, column, colour."""


def draw_session(seed: int) -> tuple[list[Image.Image], dict[str, str]]:
    """The screenshots in the order of time, and the answer of every task."""
    rng = np.random.default_rng(seed)
    start, end = (int(column) for column in rng.permutation(COLUMNS)[:2])
    triangle = int(rng.integers(COLUMNS))
    dialog, badge = (int(column) for column in rng.permutation(COLUMNS)[:2])
    colour = str(rng.choice(DIALOGS))
    page = PAGES[rng.integers(len(PAGES))]
    taken = {(0, start), (0, end), (1, triangle), (2, dialog), (2, badge)}
    free = [cell for cell in itertools.product(range(ROWS), range(COLUMNS)) if cell not in taken]
    lines = {free[number]: rng.integers(8, 29, 3).tolist() for number in rng.permutation(len(free))[:4]}
    shapes: Shapes = {"disc": (0, start, "red"), "triangle": (1, triangle, "blue"), "dialog": (2, dialog, colour)}
    order = [ACTIONS[number] for number in rng.permutation(len(ACTIONS))]
    images = [_drawn(page, lines, shapes)]
    for action in order:
        if action == "moved":
            shapes["disc"] = 0, end, "red"
        elif action == "closed":
            del shapes["dialog"]
        else:
            shapes["badge"] = 2, badge, "pink"
        images.append(_drawn(page, lines, shapes))
    return images, {"now": PLACES[end], "still": PLACES[triangle], "gone": colour, "changed": order[-1]}


def write_sessions(folder: Path, name: str, seeds: range) -> Path:
    """Screenshots as PNG and one record for each session in folder/NAME.jsonl, in the training format."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.jsonl"
    with path.open("w") as file:
        for seed in seeds:
            images, answers = draw_session(seed)
            content = []
            for number, image in enumerate(images):
                image.save(folder / name / f"{seed}-{number}.png", compress_level=1)
                content.append({"type": "image", "image": f"{name}/{seed}-{number}.png"})
            answer = " ".join(answers[task] for task in TASKS)
            messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def texts() -> list[str]:
    """Answers with every word, often enough for a tokenizer to have a token for each."""
    return [" ".join(words) for words in itertools.product(PLACES, PLACES, DIALOGS, ACTIONS)]


def _drawn(page: tuple[int, int, int], lines: dict[tuple[int, int], list[int]], shapes: Shapes) -> Image.Image:
    image = Image.new("RGB", (COLUMNS * BLOCK, ROWS * BLOCK), page)
    draw = ImageDraw.Draw(image)
    for (row, column), lengths in lines.items():
        for number, length in enumerate(lengths):
            top = row * BLOCK + 6 + 8 * number
            draw.line((column * BLOCK + 3, top, column * BLOCK + length, top), fill=_INK, width=2)
    for shape, (row, column, colour) in shapes.items():
        x1, y1 = column * BLOCK + 3, row * BLOCK + 3
        x2, y2 = x1 + BLOCK - 7, y1 + BLOCK - 7
        if shape == "disc":
            draw.ellipse((x1, y1, x2, y2), fill=COLOURS[colour])
        elif shape == "triangle":
            draw.polygon([((x1 + x2) // 2, y1), (x2, y2), (x1, y2)], fill=COLOURS[colour])
        else:
            draw.rounded_rectangle((x1, y1, x2, y2), radius=5, fill=COLOURS[colour])
    return image
