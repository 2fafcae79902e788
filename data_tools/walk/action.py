"""One thing that a person does to a screen, in words and as the call that Qwen3-VL's computer agents write."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from pixelprune.answers import to_relative

ActionName = Literal["left_click", "type", "key", "scroll", "wait", "terminate"]


@dataclass(frozen=True)
class Action:
    """name: the action of `computer_use`; words: what is done, an imperative sentence.

    place: (x, y) in pixels of the screenshot, of clicks and scrolls. box: of the element acted on. text: what is typed.
    keys: what is pressed. pixels: how far is scrolled, positive up. target, role: of the element, as assistive
    technology knows it.
    """

    name: ActionName
    words: str
    place: tuple[float, float] | None = None
    box: tuple[float, float, float, float] | None = None
    text: str = ""
    keys: tuple[str, ...] = ()
    pixels: int = 0
    target: str = ""
    role: str = ""

    def call(self, image_size: tuple[int, int]) -> dict[str, Any]:
        """The arguments of the call; coordinates relative 0-1000. image_size: (width, height) of the screenshot."""
        arguments: dict[str, Any] = {"action": self.name}
        if self.place is not None:
            arguments["coordinate"] = list(to_relative(*self.place, image_size))
        if self.name == "type":
            arguments["text"] = self.text
        elif self.name == "key":
            arguments["keys"] = list(self.keys)
        elif self.name == "scroll":
            arguments["pixels"] = self.pixels
        elif self.name == "wait":
            arguments["time"] = 1
        elif self.name == "terminate":
            arguments["status"] = "success"
        return arguments

    def response(self, image_size: tuple[int, int]) -> str:
        """What the assistant says: the sentence, then the call."""
        call = json.dumps({"name": "computer_use", "arguments": self.call(image_size)}, ensure_ascii=False)
        return f"Action: {self.words}\n<tool_call>\n{call}\n</tool_call>"

    def as_dict(self, image_size: tuple[int, int]) -> dict[str, Any]:
        """For metadata: the call, and what it means in pixels of the screenshot."""
        known = {"target": self.target, "role": self.role}
        return {
            **self.call(image_size),
            "words": self.words,
            **{key: value for key, value in known.items() if value},
            **({"place": [round(side, 2) for side in self.place]} if self.place else {}),
            **({"bbox": [round(side) for side in self.box]} if self.box else {}),
        }


FINISHED = Action("terminate", "Finish: everything is done.")
