"""What a chat template has a place for, found by asking it: a template drops what it does not know without a word."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

from pixelprune.records.record import RecordError

__all__ = ["TemplateFacts"]

PROBE = "wxprobexw"
"""No template's own text."""


class TemplateFacts:
    """Asked once each. render: turns and keyword arguments of the template -> text; raises RecordError."""

    def __init__(self, render: Callable[..., str]):
        self._render = render

    @cached_property
    def has_tools(self) -> bool:
        """Whether schemas of tools are written."""
        return self._shows([_user("q")], tools=[{"type": "function", "function": {"name": PROBE, "parameters": {}}}])

    @cached_property
    def has_calls(self) -> bool:
        """Whether an assistant's tool calls are written."""
        call = {"type": "function", "function": {"name": PROBE, "arguments": {}}}
        return self._shows([_user("q"), {"role": "assistant", "content": "", "tool_calls": [call]}])

    @cached_property
    def has_answers(self) -> bool:
        """Whether a tool's turns are written."""
        turns = [_user("q"), {"role": "assistant", "content": "z"}, {"role": "tool", "content": PROBE}]
        return self._shows(turns)

    @cached_property
    def has_reasoning(self) -> bool:
        """Whether the last answer's reasoning is written."""
        return self._shows([_user("q"), {"role": "assistant", "content": "z", "reasoning_content": PROBE}])

    @cached_property
    def prompts(self) -> list[str]:
        """The ways it asks for an answer: the default's, then those with reasoning switched on and off."""
        found = []
        for choice in ({}, {"enable_thinking": True}, {"enable_thinking": False}):
            bare = self._render([_user("q")], **choice)
            asked = self._render([_user("q")], add_generation_prompt=True, **choice)
            if asked.startswith(bare):
                found.append(asked[len(bare) :])
        return found

    def _shows(self, turns: list[dict[str, Any]], **kwargs: Any) -> bool:
        try:
            return PROBE in self._render(turns, **kwargs)
        except RecordError:
            return False


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}
