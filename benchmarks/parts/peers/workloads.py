"""The same records and the same model folder for every trainer, each in the form that it reads."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.composition.toy import build_toy_model

SAMPLES = Path(__file__).parents[3] / "data_tools" / "samples"
MIN_PIXELS = 65536


@dataclass(frozen=True)
class Workload:
    """Screenshots of one size. max_pixels: of the resized picture; batch: samples in an optimizer step."""

    name: str
    max_pixels: int
    batch: int
    steps: int

    @property
    def key(self) -> str:
        return self.name.replace(" ", "_")


WORKLOADS = (Workload("0.25 MP", 262144, 4, 12), Workload("native size", 16777216, 2, 2))


@dataclass(frozen=True)
class Record:
    """One question about one screenshot. image: absolute."""

    image: Path
    question: str
    answer: str

    def ours(self) -> dict[str, Any]:
        question = [{"type": "image", "image": self.image.name}, {"type": "text", "text": self.question}]
        return {"messages": [_turn("user", question), _turn("assistant", [{"type": "text", "text": self.answer}])]}

    def plain(self) -> dict[str, Any]:
        """As the scripts for HF's Trainer and TRL read it; both build their own data from it."""
        return {"images": [str(self.image)], "question": self.question, "answer": self.answer}

    def placeholders(self) -> dict[str, Any]:
        """As ms-swift and LLaMA-Factory read it: pictures aside, their places marked in the text."""
        messages = [_turn("user", f"<image>{self.question}"), _turn("assistant", self.answer)]
        return {"messages": messages, "images": [str(self.image)]}


def choose_records(num: int, images: Path) -> list[Record]:
    """The first `num` committed records, one of every screenshot in turn; `images` gets copies of the screenshots.

    Copies, because a drill damages one. Raises ValueError where there are fewer records.
    """
    rows = [json.loads(line) for line in (SAMPLES / "train.jsonl").read_text().splitlines()]
    by_image: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_image.setdefault(row["messages"][0]["content"][0]["image"], []).append(row)
    in_turn = [row for rows in itertools.zip_longest(*by_image.values()) for row in rows if row is not None]
    if num > len(in_turn):
        raise ValueError(f"expected at most {len(in_turn)} records, got {num}")
    images.mkdir(parents=True, exist_ok=True)
    records = []
    for row in in_turn[:num]:
        picture, question = row["messages"][0]["content"]
        copy = images.absolute() / Path(picture["image"]).name
        if not copy.exists():
            copy.write_bytes((SAMPLES / picture["image"]).read_bytes())
        records.append(Record(copy, question["text"], row["messages"][1]["content"][0]["text"]))
    return records


def write_records(records: list[Record], form: str, path: Path) -> None:
    """JSON lines in one of the three forms of `Record`. Our own stand beside the screenshots: paths are relative.

    A file that says the same is left alone: a later start of ours finds the index of an earlier one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(getattr(record, form)()) + "\n" for record in records)
    if not path.exists() or path.read_text() != lines:
        path.write_text(lines)


def write_model(folder: Path, max_pixels: int) -> None:
    """The toy model with its size limits where each trainer's processor looks for them."""
    build_toy_model(folder)
    path = folder / "preprocessor_config.json"
    settings = json.loads(path.read_text())
    settings["size"] = {"shortest_edge": MIN_PIXELS, "longest_edge": max_pixels}
    settings["processor_class"] = "Qwen3VLProcessor"
    path.write_text(json.dumps(settings, indent=2) + "\n")


def _turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}
