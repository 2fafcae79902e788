"""Hugging Face and vLLM answers of a checkpoint side by side: whether a deployment serves what was trained."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from pixelprune.command import plain_console
from pixelprune.vllm.answers import Answer

TOLERANCE = 0.1
"""Log-probability by which rounding alone may move a token, in bfloat16. Measured on toys: see docs/serving.md."""


@dataclass(frozen=True)
class Pair:
    """One image's two answers."""

    image: str
    trained: Answer
    served: Answer

    @property
    def first_difference(self) -> int | None:
        """Number of the first token, from 0, that differs; None where none does."""
        pairs = zip(self.trained.token_ids, self.served.token_ids, strict=False)
        differing = (place for place, (mine, theirs) in enumerate(pairs) if mine != theirs)
        shorter = min(len(self.trained.token_ids), len(self.served.token_ids))
        same_length = len(self.trained.token_ids) == len(self.served.token_ids)
        return next(differing, None if same_length else shorter)

    @property
    def gap(self) -> float:
        """Largest difference of the chosen tokens' log-probabilities, up to and with the first token that differs."""
        first = self.first_difference
        stop = None if first is None else first + 1
        pairs = zip(self.trained.logprobs[:stop], self.served.logprobs[:stop], strict=False)
        return max((abs(mine - theirs) for mine, theirs in pairs), default=0.0)

    def verdict(self, tolerance: float) -> str:
        """What the two answers say of each other; begins with "same", "tie" or "DIFFERENT"."""
        trained, served = self.trained.prompt_tokens, self.served.prompt_tokens
        if trained != served:
            return f"DIFFERENT: {trained} prompt tokens trained, {served} served"
        if self.gap > tolerance:
            return f"DIFFERENT: log-probabilities by {self.gap:.3f}"
        if self.first_difference is None:
            return "same"
        return f"tie at token {self.first_difference + 1}"


def run_parity(
    folder: str,
    images: Sequence[Path],
    *,
    question: str,
    max_tokens: int,
    dtype: str = "auto",
    engine: str = "{}",
    tolerance: float = TOLERANCE,
) -> int:
    """Print the table; returns 0 where all answers are the same or ties, 1 otherwise.

    engine: a JSON object of arguments for `vllm.LLM`, those of the deployment.
    Raises ValueError where vLLM is not installed, for images that do not exist, or when a side fails.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ValueError("parity needs vllm in this environment (docs/serving.md: make vllm-env)")
    missing = [str(image) for image in images if not image.is_file()]
    if missing:
        raise ValueError(f"no such image: {', '.join(missing)}")
    try:
        options = json.loads(engine)
    except json.JSONDecodeError as error:
        raise ValueError(f"--engine: expected a JSON object of vllm.LLM's arguments: {error}") from error
    task = {
        "model": folder,
        "images": [str(image.absolute()) for image in images],
        "question": question,
        "max_tokens": max_tokens,
        "dtype": dtype,
        "engine": options,
    }
    trained, served = (_answers_of(side, task) for side in ("hugging_face", "vllm"))
    pairs = [Pair(image.name, *both) for image, *both in zip(images, trained, served, strict=True)]
    _print(pairs, tolerance)
    return int(any(pair.verdict(tolerance).startswith("DIFFERENT") for pair in pairs))


def _answers_of(side: str, task: dict[str, Any]) -> list[Answer]:
    plain_console(stderr=True).print(f"asking {side}, {len(task['images'])} images")
    with tempfile.TemporaryDirectory() as scratch:
        asked, answered = Path(scratch) / "task.json", Path(scratch) / "answers.json"
        asked.write_text(json.dumps(task))
        command = [sys.executable, "-m", "pixelprune.vllm.answers", side, str(asked), str(answered)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ValueError(f"{side} did not answer:\n{(done.stderr or done.stdout)[-3000:]}")
        return [Answer(**answer) for answer in json.loads(answered.read_text())]


def _print(pairs: list[Pair], tolerance: float) -> None:
    console = plain_console()
    table = Table("image", "prompt tokens", "blocks", "Hugging Face", "vLLM", "verdict")
    for pair in pairs:
        table.add_row(
            pair.image,
            str(pair.served.prompt_tokens),
            str(pair.trained.num_blocks),
            pair.trained.text,
            pair.served.text,
            pair.verdict(tolerance),
        )
    console.print(table)
    unpruned = [pair for pair in pairs if pair.served.prompt_tokens > pair.trained.prompt_tokens]
    if unpruned:
        console.print(
            f"{len(unpruned)} of {len(pairs)} images were served with more tokens than the checkpoint was trained "
            "with. Is the plugin left out by VLLM_PLUGINS, or not installed in this environment?",
            soft_wrap=True,
        )
