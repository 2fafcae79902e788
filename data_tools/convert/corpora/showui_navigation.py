"""ShowUI's navigation sets (GUIAct, AITW) -> conversations: screenshots and actions before, then the one to be learnt.

Fields (github.com/showlab/ShowUI, data/dset_shared_navigation.py and data/dset_aitw.py, commit 21ed7cb): task, img_url
(without .png), step_history, a list of such steps. A step of GUIAct, alone or in a list under `step`, has action_type,
action_value and point; one of AITW has action_type_id, action_type_text, touch, lift and type_text. Places are
fractions of the image. Every step is an entry of its own: the actions of its history are read and not trained on.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from data_tools.convert.benchmarks.reader import text_of
from data_tools.convert.corpora.reader import CorpusReader
from data_tools.convert.dropped import DropError
from data_tools.convert.image_files import ImageFiles
from pixelprune.answers import RELATIVE

POINTED = ("CLICK", "INPUT", "SELECT", "HOVER", "TAP")
DRAGGED = ("SELECT_TEXT", "SWIPE")
VALUED = ("INPUT", "SELECT", "ANSWER", "COPY", "SCROLL")
_TYPE, _DUAL_POINT = 3, 4
"""AITW's action_type_id."""


class ShowUINavigationReader(CorpusReader):
    """Actions are JSON with action, value and position, as ShowUI has them, positions relative 0-1000."""

    def __init__(self, images: ImageFiles, *, history: int = 4) -> None:
        """history: screenshots before the one to act on; the actions of earlier steps stand as text."""
        super().__init__(images, "showui-navigation")
        if history < 0:
            raise ValueError(f"--history: expected 0 or more, got {history}")
        self.history = history

    def make(self, entry: dict[str, Any], file: Path, number: int) -> dict[str, Any]:
        before = entry.get("step_history") or []
        if not isinstance(before, list) or not all(isinstance(step, dict) for step in before):
            raise DropError("step_history is no list of objects")
        num_as_text = max(len(before) - self.history, 0)
        actions = [_actions(step) for step in (*before, entry)]
        task = f"Task: {text_of(entry, 'task')}"
        if num_as_text:
            task += "\nActions before:" + "".join(f"\n{action}" for action in actions[:num_as_text])
        messages: list[dict[str, Any]] = []
        sizes = []
        shown = [*before, entry][num_as_text:]
        for step, action in zip(shown, actions[num_as_text:], strict=True):
            name = self._image(step)
            sizes.append(list(self.images.size(name, has_coordinates=True)))
            content = [{"type": "image", "image": self.images.relative(name)}]
            content += [] if messages else [{"type": "text", "text": task}]
            messages.append({"role": "user", "content": content})
            is_history = {} if step is entry else {"loss": False}
            messages.append({"role": "assistant", "content": [{"type": "text", "text": action}], **is_history})
        metadata = {"source": self.source, "image_sizes": sizes, "num_steps_before": len(before)}
        return {"id": self.record_id(entry, file, number), "messages": messages, "metadata": metadata}

    def _image(self, step: dict[str, Any]) -> str:
        name = text_of(step, "img_url")
        return self.find_image(name if name.lower().endswith((".png", ".jpg", ".jpeg")) else f"{name}.png")


def _actions(step: dict[str, Any]) -> str:
    """A step's action, or several, one a line."""
    if "action_type_id" in step:
        return _aitw_action(step)
    said = step.get("step", step)
    parts = said if isinstance(said, list) else [said]
    if not parts or not all(isinstance(part, dict) for part in parts):
        raise DropError("step is no object, or list of such")
    return "\n".join(map(_action, parts))


def _action(step: dict[str, Any]) -> str:
    kind = text_of(step, "action_type").upper()
    point, position = step.get("point"), None
    if kind in DRAGGED:
        if not isinstance(point, list) or len(point) != 2:
            raise DropError("point is not two points")
        position = [_relative(end) for end in point]
    elif kind in POINTED and point is not None:
        position = _relative(point)
    return _written(kind, step.get("action_value") if kind in VALUED else None, position)


def _aitw_action(step: dict[str, Any]) -> str:
    kind, value, position = text_of(step, "action_type_text"), None, None
    if step["action_type_id"] == _DUAL_POINT and kind == "click":
        ends = [_relative(step.get(key), 1) for key in ("touch", "lift")]
        position = _relative([(touch + lift) / 2 for touch, lift in zip(*ends, strict=True)])
    elif step["action_type_id"] == _TYPE:
        value = text_of(step, "type_text")
    return _written(kind.upper(), value, position)


def _relative(point: Any, scale: int = RELATIVE) -> list[Any]:
    """A point (x, y) of fractions times `scale`, whole numbers for RELATIVE. Raises DropError for what is none."""
    is_pair = isinstance(point, list) and len(point) == 2
    if not is_pair or not all(type(side) in (int, float) for side in point):
        raise DropError("a place is not two numbers")
    if not all(0 <= side <= 1 for side in point):
        raise DropError("a place is outside the image, or no fractions of it")
    return [math.floor(side * scale + 0.5) if scale == RELATIVE else side for side in point]


def _written(action: str, value: Any, position: Any) -> str:
    return json.dumps({"action": action, "value": value, "position": position}, ensure_ascii=False)
