"""Sessions that `data_tools sessions` walked, as the model sees them: resized pictures, actions with their places."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pixelprune.images.image import decode_image, resize_image
from pixelprune.records.presets import PRESETS
from pixelprune.settings import BLOCK, ResizeSettings

_PROMPT_LEN, _CALL_LEN = 160, 110
"""Characters of a question around its instruction, and of an answer around its sentence."""
SAMPLES = Path(__file__).parents[2] / "data_tools" / "session_samples"


@dataclass(frozen=True)
class Walked:
    """One session. images: uint8 (height, width, 3) after resizing, a step each; kinds: what each step's action did.

    blocks: (row, column) of the block under each action, None for actions without a place. words: what each action is
    in words.
    """

    name: str
    images: list[np.ndarray]
    kinds: list[str]
    blocks: list[tuple[int, int] | None]
    words: list[str]

    def __len__(self) -> int:
        return len(self.images)

    def num_text_tokens(self, first: int, last: int) -> int:
        """Of the record that shows the screenshots from `first` to `last`, at four characters a token.

        System prompt, instruction, earlier actions in words, answers with their calls.
        """
        answers = sum(_CALL_LEN + len(words) for words in self.words[first : last + 1])
        told = len("".join(self.words)) + len("".join(self.words[:first]))
        return (len(PRESETS["computer_use_agent"].system) + _PROMPT_LEN + told + answers) // 4


def read_walked(folder: Path, resize: ResizeSettings) -> list[Walked]:
    """The sessions of a folder, in the order of sessions.jsonl."""
    sessions = []
    for line in (folder / "sessions.jsonl").read_text(encoding="utf-8").splitlines():
        session = json.loads(line)
        decoded = {}
        for step in session["steps"]:
            if step["image"] not in decoded:
                stored = decode_image(folder / step["image"], resize)
                decoded[step["image"]] = (resize_image(stored, resize), stored.size)
        images = [decoded[step["image"]][0] for step in session["steps"]]
        sizes = [decoded[step["image"]][1] for step in session["steps"]]
        steps = session["steps"]
        sessions.append(
            Walked(
                session["id"],
                images,
                [step["kind"] for step in steps],
                [
                    _block(step.get("place"), size, image)
                    for step, size, image in zip(steps, sizes, images, strict=True)
                ],
                [step["words"] for step in steps],
            )
        )
    return sessions


def _block(place: list[float] | None, size: tuple[int, int], image: np.ndarray) -> tuple[int, int] | None:
    if place is None:
        return None
    rows, cols = image.shape[0] // BLOCK, image.shape[1] // BLOCK
    return min(rows - 1, int(place[1] / size[1] * rows)), min(cols - 1, int(place[0] / size[0] * cols))
