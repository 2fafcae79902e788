"""Episodes of many steps -> conversations: the goal, then a screenshot and its action, step after step.

The screenshots before an action are its history, each encoded once; an action is trained on once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.convert.corpora.reader import CorpusReader
from data_tools.convert.dropped import DropError, check_unicode
from data_tools.convert.image_files import ImageFiles

__all__ = ["Episode", "EpisodeReader"]


@dataclass(frozen=True)
class Episode:
    """What is said of an episode: its name, the goal, and an instruction for every step."""

    name: str
    goal: str
    instructions: list[str]


class EpisodeReader(CorpusReader):
    """Windows of at most `max_steps` steps of every episode; subclasses read the episode, its images and actions.

    A window that is not the first begins with the goal and the instructions of the steps before it, as text.
    """

    def __init__(self, images: ImageFiles, source: str, *, max_steps: int = 8, with_instructions: bool = False) -> None:
        """with_instructions: every step's own instruction stands beside its screenshot (the low-level task)."""
        super().__init__(images, source)
        if max_steps < 1:
            raise ValueError(f"--max-steps: expected 1 or more, got {max_steps}")
        self.max_steps = max_steps
        self.with_instructions = with_instructions

    def windows(self, entry: dict[str, Any], num_steps: int) -> list[dict[str, Any]]:
        """The entry once for every window, with `start`, the window's first step; once for an episode without steps."""
        return [{**entry, "start": start} for start in range(0, max(num_steps, 1), self.max_steps)]

    def episode(self, entry: dict[str, Any]) -> Episode:
        """Raises DropError with the reason."""
        raise NotImplementedError

    def image(self, entry: dict[str, Any], step: int) -> str:
        """The name of a step's screenshot below the image folder. Raises DropError."""
        raise NotImplementedError

    def action(self, entry: dict[str, Any], step: int, size: tuple[int, int]) -> str:
        """A step's action with its places relative 0-1000. size: (width, height) pixels. Raises DropError."""
        raise NotImplementedError

    def make(self, entry: dict[str, Any], file: Path, number: int) -> dict[str, Any]:
        """One window. A step that cannot be read ends the window: what follows would have another history."""
        episode, start = self.episode(entry), entry["start"]
        done = "".join(f"\n{i}. {said}" for i, said in enumerate(episode.instructions[:start], start=1))
        task = f"Task: {episode.goal}" + (f"\nSteps done:{done}" if done else "")
        messages: list[dict[str, Any]] = []
        sizes = []
        for step in range(start, min(start + self.max_steps, len(episode.instructions))):
            try:
                name = self.image(entry, step)
                size = self.images.size(name, has_coordinates=True)
                answer = self.action(entry, step, size)
                check_unicode([answer])
            except DropError as error:
                if not messages:
                    raise
                self.dropped_parts[f"{error} (with the steps behind it)"] += 1
                break
            texts = [] if messages else [task]
            texts += [f"Step: {episode.instructions[step]}"] if self.with_instructions else []
            content = [{"type": "image", "image": self.images.relative(name)}]
            content += [{"type": "text", "text": "\n".join(texts)}] if texts else []
            messages.append({"role": "user", "content": content})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
            sizes.append(list(size))
        metadata = {"source": self.source, "episode_id": episode.name, "first_step": start, "image_sizes": sizes}
        return {"id": f"{self.source}-{episode.name}-{start}", "messages": messages, "metadata": metadata}
