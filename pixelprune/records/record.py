"""The one typed record that every format is read into: messages with text and images in order."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from PIL import Image

__all__ = ["ROLES", "ImageRef", "Message", "Record", "RecordError"]

ROLES = ("system", "user", "assistant")


class RecordError(ValueError):
    """A record that cannot be used. `reason` is a short code for counting; the message says what is wrong where."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.reason, str(self))


@dataclass(frozen=True)
class ImageRef:
    """One image of a record: a path (relative to the source's root), encoded bytes, or a decoded picture."""

    source: str | bytes | Image.Image


Part = str | ImageRef
"""A piece of a message: text, or an image at its place in the text."""


@dataclass(frozen=True)
class Message:
    """One turn: `role` is one of ROLES, `parts` are text and images in order.

    weight: scales the loss of an assistant turn, 0 for one that is read and not trained on;
    without meaning in other turns.
    """

    role: str
    parts: tuple[Part, ...]
    weight: float = 1.0

    @property
    def supervised(self) -> bool:
        """Whether the turn is trained on."""
        return self.role == "assistant" and self.weight > 0

    @property
    def text(self) -> str:
        return "".join(part for part in self.parts if isinstance(part, str))


@dataclass(frozen=True)
class Record:
    """One conversation.

    weight multiplies the source's weight; metadata is everything else the file says (grounding boxes, ids, source).
    """

    messages: tuple[Message, ...]
    metadata: dict[str, Any] = field(default_factory=dict)
    weight: float = 1.0

    @property
    def images(self) -> list[ImageRef]:
        return [part for message in self.messages for part in message.parts if isinstance(part, ImageRef)]
