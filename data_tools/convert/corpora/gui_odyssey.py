"""GUI-Odyssey's episodes -> conversations.

Fields (github.com/OpenGVLab/GUI-Odyssey, introduction.md, commit fefcbe9), one JSON file an episode: episode_id,
task_info.instruction, and steps of screenshot, action (CLICK, LONG_PRESS, SCROLL, TYPE, COMPLETE, INCOMPLETE), info
(coordinates relative 0-1000, or a key) and low_level_instruction. Actions are written as its data/format_converter.py
writes them; there TYPE is called TEXT, and its text stands in info.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_tools.convert.benchmarks.reader import text_of
from data_tools.convert.corpora.episodes import Episode, EpisodeReader
from data_tools.convert.dropped import DropError
from data_tools.convert.image_files import ImageFiles
from pixelprune.answers import RELATIVE

KEYS = {"KEY_HOME": "PRESS_HOME", "KEY_BACK": "PRESS_BACK", "KEY_APPSELECT": "PRESS_RECENT"}


class GUIOdysseyReader(EpisodeReader):
    """--images is the folder screenshots."""

    def __init__(self, images: ImageFiles, *, max_steps: int = 8, with_instructions: bool = False) -> None:
        super().__init__(images, "gui-odyssey", max_steps=max_steps, with_instructions=with_instructions)

    def entries(self, path: Path) -> Iterator[tuple[Any, int]]:
        """The windows of the one episode of a file. Raises ValueError for a file that is no JSON."""
        try:
            episode = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: not JSON: {error}") from error
        steps = episode.get("steps") if isinstance(episode, dict) else None
        size = path.stat().st_size
        if not isinstance(steps, list):
            yield {"start": 0}, size
            return
        for window in self.windows(episode, len(steps)):
            yield window, size

    def episode(self, entry: dict[str, Any]) -> Episode:
        task, steps = entry.get("task_info"), entry.get("steps")
        if not isinstance(steps, list) or not steps or not all(isinstance(step, dict) for step in steps):
            raise DropError("steps is no list of objects")
        goal = text_of(task if isinstance(task, dict) else {}, "instruction")
        return Episode(text_of(entry, "episode_id"), goal, [text_of(step, "low_level_instruction") for step in steps])

    def image(self, entry: dict[str, Any], step: int) -> str:
        return self.find_image(text_of(entry["steps"][step], "screenshot"))

    def action(self, entry: dict[str, Any], step: int, size: tuple[int, int]) -> str:
        action, info = entry["steps"][step].get("action"), entry["steps"][step].get("info")
        if action in ("CLICK", "LONG_PRESS"):
            if isinstance(info, str) and info in KEYS:
                return KEYS[info]
            ((x, y),) = _points(info, 1)
            return f"{action}: ({x}, {y})"
        if action == "SCROLL":
            (x1, y1), (x2, y2) = _points(info, 2)
            right, down = x2 - x1, y2 - y1
            if abs(right) > abs(down):
                return "SCROLL: LEFT" if right < 0 else "SCROLL: RIGHT"
            return "SCROLL: UP" if down < 0 else "SCROLL: DOWN"
        if action in ("TYPE", "TEXT"):
            if not isinstance(info, str) or not info:
                raise DropError("a text to type is missing")
            return f"TYPE: {info}"
        if action in ("COMPLETE", "INCOMPLETE"):
            return "COMPLETE" if action == "COMPLETE" else "IMPOSSIBLE"
        raise DropError("an action of another kind")


def _points(info: Any, count: int) -> list[tuple[int, int]]:
    points = info if isinstance(info, list) else []
    is_pairs = len(points) >= count and all(isinstance(point, list) and len(point) == 2 for point in points[:count])
    if not is_pairs or not all(type(side) in (int, float) for point in points[:count] for side in point):
        raise DropError(f"info is not {count} points")
    if not all(0 <= side <= RELATIVE for point in points[:count] for side in point):
        raise DropError("coordinates outside the image")
    return [(round(x), round(y)) for x, y in points[:count]]
