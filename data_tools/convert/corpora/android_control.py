"""AndroidControl's episodes -> conversations.

Fields (github.com/google-research/google-research, android_control/README.md, commit 0ced6d0), of TFRecord files
compressed by gzip: episode_id, goal, screenshots (PNG), screenshot_widths, screenshot_heights, actions (JSON), one
fewer than screenshots, and step_instructions, as many as actions. Accessibility trees are not read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_tools.convert.corpora.episodes import Episode, EpisodeReader
from data_tools.convert.corpora.tfrecord import iter_examples
from data_tools.convert.dropped import DropError
from data_tools.convert.image_files import ImageFiles
from pixelprune.answers import to_relative
from pixelprune.files import write_whole

FIELDS = ("episode_id", "goal", "screenshots", "actions", "step_instructions")


class AndroidControlReader(EpisodeReader):
    """Actions are the published JSON with x and y relative. Pictures are written to images.folder/android_control."""

    def __init__(self, images: ImageFiles, *, max_steps: int = 8, with_instructions: bool = False) -> None:
        super().__init__(images, "android-control", max_steps=max_steps, with_instructions=with_instructions)

    def entries(self, path: Path) -> Iterator[tuple[Any, int]]:
        """A window of an episode each: the episode's fields, and `start`, its first step."""
        for episode, position in iter_examples(path):
            for window in self.windows(episode, len(episode.get("actions", []))):
                yield window, position

    def episode(self, entry: dict[str, Any]) -> Episode:
        if missing := [name for name in FIELDS if not entry.get(name)]:
            raise DropError(f"no {missing[0]}")
        screenshots, actions, steps = (entry[name] for name in ("screenshots", "actions", "step_instructions"))
        if len(screenshots) < len(actions) or len(steps) != len(actions):
            raise DropError("screenshots, actions and step instructions do not match")
        return Episode(str(entry["episode_id"][0]), _text(entry["goal"][0]), [_text(step) for step in steps])

    def image(self, entry: dict[str, Any], step: int) -> str:
        path = f"android_control/{entry['episode_id'][0]}_{step}.png"
        target, picture = self.images.folder / path, entry["screenshots"][step]
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists() or target.read_bytes() != picture:
            write_whole(target, picture)
        return path

    def action(self, entry: dict[str, Any], step: int, size: tuple[int, int]) -> str:
        try:
            action = json.loads(entry["actions"][step])
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
