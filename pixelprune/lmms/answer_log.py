"""Answers kept as they are made: lmms-eval writes those of a whole task at its end, and a kill would lose them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import xxhash

from pixelprune.files import write_whole
from pixelprune.sample import Sample


@dataclass(frozen=True)
class LoggedAnswer:
    """One document's answer. key: of everything it depends on; kept_blocks, full_blocks: over all its images."""

    key: str
    task: str
    doc_id: str
    text: str
    kept_blocks: int
    full_blocks: int
    num_generated: int


class AnswerLog:
    """A folder with one JSON lines file per rank; all ranks read what any rank of an earlier start has written."""

    def __init__(self, folder: Path, rank: int, settings: str):
        """settings: what the answers depend on beside the prompt, such as weights and limits."""
        self.settings = settings
        self._path = folder / f"rank{rank:04d}.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        if self._path.exists():  # a line that a kill cut short has no end, and must not swallow the next one
            whole, end, _ = self._path.read_bytes().rpartition(b"\n")
            write_whole(self._path, whole + end)
        self._answers: dict[str, LoggedAnswer] = {}
        for path in sorted(folder.glob("rank*.jsonl")):
            for line in path.read_bytes().split(b"\n")[:-1]:
                answer = LoggedAnswer(**json.loads(line))
                self._answers[answer.key] = answer

    def key(self, sample: Sample, max_new_tokens: int) -> str:
        """Of a prompt's tokens, positions and kept pixels, and of how many tokens may follow."""
        digest = xxhash.xxh3_128(f"{self.settings}\0{max_new_tokens}".encode())
        for array in (sample.input_ids, sample.position_ids, *(image.blocks for image in sample.images)):
            digest.update(f"{array.shape}{array.dtype}".encode())
            digest.update(array.tobytes())
        return digest.hexdigest()

    def get(self, key: str) -> LoggedAnswer | None:
        return self._answers.get(key)

    def add(self, answers: Iterable[LoggedAnswer]) -> None:
        """Write the answers of a batch, whole lines in one piece."""
        made = list(answers)
        self._answers |= {answer.key: answer for answer in made}
        with self._path.open("ab") as file:
            file.write("".join(json.dumps(asdict(answer)) + "\n" for answer in made).encode())
