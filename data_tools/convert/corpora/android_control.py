"""AndroidControl's episodes -> conversations: the goal, then a screenshot and its action, step after step.

Fields (github.com/google-research/google-research, android_control/README.md, commit 0ced6d0), of TFRecord files
compressed by gzip: episode_id, goal, screenshots (PNG), screenshot_widths, screenshot_heights, actions (JSON), one
fewer than screenshots, and step_instructions, as many as actions. Accessibility trees are not read.

The screenshots before an action are its history, each encoded once; an action is trained on once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_tools.convert.corpora.reader import CorpusReader
from data_tools.convert.corpora.tfrecord import iter_examples
from data_tools.convert.dropped import DropError
from data_tools.convert.image_files import ImageFiles
from pixelprune.answers import to_relative
from pixelprune.files import write_whole

FIELDS = ("episode_id", "goal", "screenshots", "actions", "step_instructions")


class AndroidControlReader(CorpusReader):
    """Windows of at most `max_steps` steps of every episode; pictures are written to images.folder/android_control.

    A window that is not the first begins with the goal and the instructions of the steps before it, as text.
    """

    def __init__(self, images: ImageFiles, *, max_steps: int = 8, with_instructions: bool = False) -> None:
        """with_instructions: every step's own instruction stands beside its screenshot (the low-level task)."""
        super().__init__(images, "android-control")
        if max_steps < 1:
            raise ValueError(f"--max-steps: expected 1 or more, got {max_steps}")
        self.max_steps = max_steps
        self.with_instructions = with_instructions

    def entries(self, path: Path) -> Iterator[tuple[Any, int]]:
        """A window of an episode each: the episode's fields, and `start`, its first step."""
        for episode, position in iter_examples(path):
            for start in range(0, max(len(episode.get("actions", [])), 1), self.max_steps):
                yield {**episode, "start": start}, position

    def make(self, entry: dict[str, Any], file: Path, number: int) -> dict[str, Any]:
        """One window. A step whose action cannot be read ends the window: what follows would have another history."""
        if missing := [name for name in FIELDS if not entry.get(name)]:
            raise DropError(f"no {missing[0]}")
        goal, episode, start = _text(entry["goal"][0]), entry["episode_id"][0], entry["start"]
        screenshots, actions, steps = (entry[name] for name in ("screenshots", "actions", "step_instructions"))
        if len(screenshots) < len(actions) or len(steps) != len(actions):
            raise DropError("screenshots, actions and step instructions do not match")
        done = "".join(f"\n{i}. {_text(step)}" for i, step in enumerate(steps[:start], start=1))
        task = f"Task: {goal}" + (f"\nSteps done:{done}" if done else "")
        messages: list[dict[str, Any]] = []
        sizes = []
        for step in range(start, min(start + self.max_steps, len(actions))):
            try:
                name = self._written(screenshots[step], f"{episode}_{step}")
                size = self.images.size(name, has_coordinates=True)
                answer = _action(actions[step], size)
            except DropError as error:
                if not messages:
                    raise
                self.dropped_parts[f"{error} (with the steps behind it)"] += 1
                break
            texts = [] if messages else [task]
            texts += [f"Step: {_text(steps[step])}"] if self.with_instructions else []
            content = [{"type": "image", "image": self.images.relative(name)}]
            content += [{"type": "text", "text": "\n".join(texts)}] if texts else []
            messages.append({"role": "user", "content": content})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
            sizes.append(list(size))
        metadata = {"source": self.source, "episode_id": episode, "first_step": start, "image_sizes": sizes}
        return {"id": f"{self.source}-{episode}-{start}", "messages": messages, "metadata": metadata}

    def _written(self, picture: bytes, name: str) -> str:
        path = f"android_control/{name}.png"
        target = self.images.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists() or target.read_bytes() != picture:
            write_whole(target, picture)
        return path


def _action(encoded: bytes, size: tuple[int, int]) -> str:
    """The action as JSON, its x and y relative 0-1000 to the screenshot of size (width, height)."""
    try:
        action = json.loads(encoded)
    except ValueError as error:
        raise DropError("an action is not JSON") from error
    if not isinstance(action, dict) or not isinstance(action.get("action_type"), str):
        raise DropError("an action has no action_type")
    if "x" in action or "y" in action:
        x, y = action.get("x"), action.get("y")
        if not isinstance(x, int | float) or not isinstance(y, int | float):
            raise DropError("an action's x and y are no numbers")
        if not (0 <= x <= size[0] and 0 <= y <= size[1]):
            raise DropError("coordinates outside the image")
        action["x"], action["y"] = to_relative(x, y, size)
    return json.dumps(action, ensure_ascii=False)


def _text(data: bytes) -> str:
    try:
        return data.decode().strip()
    except UnicodeDecodeError as error:
        raise DropError("not valid Unicode") from error
