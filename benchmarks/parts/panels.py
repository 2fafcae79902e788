"""A task that a toy model learns in a minute and pruning breaks: crops of the sample screens under a flat panel.

How wide the panel is, a model on all tokens can read from how many of its tokens are panel; pruning leaves one of
these, so that it has to be read from where the rest of the screen begins. Which colour it has, pruning does not hide.
"""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.parts.small_model import make_small_model
from pixelprune.settings import BLOCK

SAMPLES = Path("data_tools/samples")
ROWS, COLUMNS = 2, 7
COLOURS = {"red": (200, 40, 30), "green": (40, 160, 60), "blue": (30, 60, 200), "grey": (120, 120, 120)}
WIDTH, COLOUR = "How wide?", "Which colour?"
NUM_WIDTHS = COLUMNS - 1
NOISE = 0.4
"""Share of the noisy labels that are another answer than the right one, drawn evenly."""
_PAGES = {"narrow": slice(2), "val": slice(0, None, 2), "test": slice(1, None, 2)}
"""Which pages of its split a kind of records shows, where not all."""


def make_records(folder: Path, sizes: dict[str, int]) -> None:
    """FOLDER/NAME.jsonl for each name of `sizes` and its number of records, with their pictures.

    full (what the Full model is trained on), val and test ask both questions; noisy does with wrong labels among the
    right ones, right and bare are the same prompts with right ones and without any; narrow asks for widths alone, on
    two pages.
    """
    for name, num in sizes.items():
        source = "noisy" if name in ("right", "bare") else name
        (folder / source).mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng([ord(letter) for letter in source])
        pages = _pages("eval" if name in ("val", "test") else "train")
        pages = pages[_PAGES.get(name, slice(None))]
        lines = [_record(folder, name, source, number, pages, rng) for number in range(num)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


def _record(
    folder: Path, name: str, source: str, number: int, pages: list[np.ndarray], rng: np.random.Generator
) -> str:
    """One line of the kind `name`, with its picture in the folder of `source`."""
    page = pages[number % len(pages)]
    top = int(rng.integers(0, page.shape[0] - BLOCK * ROWS + 1))
    left = int(rng.integers(0, page.shape[1] - BLOCK * COLUMNS + 1))
    picture = page[top : top + BLOCK * ROWS, left : left + BLOCK * COLUMNS].copy()
    width, colour = int(rng.integers(1, NUM_WIDTHS + 1)), str(rng.choice(list(COLOURS)))
    picture[:, : BLOCK * width] = COLOURS[colour]
    Image.fromarray(picture).save(folder / source / f"{number}.png")
    question = WIDTH if source == "narrow" or rng.random() < 0.5 else COLOUR
    answers = [str(n) for n in range(1, NUM_WIDTHS + 1)] if question == WIDTH else list(COLOURS)
    answer = str(width) if question == WIDTH else colour
    is_wrong, other = rng.random() < NOISE, str(rng.choice([one for one in answers if one != answer]))
    if name == "noisy" and is_wrong:
        answer = other
    content = [{"type": "image", "image": f"{source}/{number}.png"}, {"type": "text", "text": question}]
    turns: list[dict] = [{"role": "user", "content": content}]
    return json.dumps({"messages": turns + [{"role": "assistant", "content": answer}] * (name != "bare")})


def _pages(split: str) -> list[np.ndarray]:
    """The screenshots that a split of the samples shows: pages of training and evaluation are other ones."""
    records = [json.loads(line) for line in (SAMPLES / f"{split}.jsonl").read_text().splitlines()]
    names = sorted({part["image"] for r in records for part in r["messages"][0]["content"] if part["type"] == "image"})
    return [np.asarray(Image.open(SAMPLES / name).convert("RGB")) for name in names]


def make_model(folder: Path, seed: int) -> Path:
    """Random weights of that seed, in a folder."""
    return make_small_model(folder, [WIDTH, COLOUR, *COLOURS, "1 2 3 4 5 6"] * 4, seed)
