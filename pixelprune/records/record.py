"""The one typed record that every format is read into: messages with text and images in order."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from pixelprune.images.sizing import NO_WISH, SizeWish

__all__ = [
    "OUT_OF_MEMORY",
    "ROLES",
    "UNEXPECTED",
    "AnswerTokens",
    "ImageRef",
    "Message",
    "ObjectMark",
    "Record",
    "RecordError",
    "of_the_record",
]

UNEXPECTED = "unexpected"
OUT_OF_MEMORY = "out_of_memory"
"""The two reasons that may lie in the program or the machine: another start may know better."""

ROLES = ("system", "user", "assistant", "tool")


class RecordError(ValueError):
    """A record that cannot be used. `reason` is a short code for counting; the message says what is wrong where."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.reason, str(self))


@contextmanager
def of_the_record() -> Iterator[None]:
    """Whatever goes wrong in here is the record's: RecordError, with reason `unexpected` where nobody thought of it,
    and `out_of_memory` where memory was short, be it the record's fault or the machine's.

    A run of millions of records is not ended by one of them, and stops by itself when there are many. The error stays
    the cause; its kind, words and place stand in the message.
    """
    try:
        yield
    except RecordError:
        raise
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(frame.filename).name}:{frame.lineno}"
        reason = OUT_OF_MEMORY if isinstance(error, MemoryError) else UNEXPECTED
        raise RecordError(reason, f"{type(error).__name__}: {error} ({place})") from error


@dataclass(frozen=True)
class ImageRef:
    """One image of a record: a path (relative to the source's root), encoded bytes, or a decoded picture.

    wish: the size that the record wants it resized to. starts_session: it has nothing to do with the image before it.
    """

    source: str | bytes | Image.Image
    wish: SizeWish = NO_WISH
    starts_session: bool = False


@dataclass(frozen=True)
class ObjectMark:
    """A thing that the record names beside its turns, where a turn's text has a mark for it.

    words: what it is called; "" for a place. place: x, y or x1, y1, x2, y2 in what `unit` says
    (`pixelprune.records.objects.UNITS`); image: the number of the image it lies in, from 0 on.
    """

    words: str = ""
    place: tuple[float, ...] = ()
    unit: str = "real"
    image: int = 0


Part = str | ImageRef | ObjectMark
"""A piece of a message: text, an image at its place in the text, or a thing that is text once image sizes are known."""


@dataclass(frozen=True)
class AnswerTokens:
    """An answer as the ids that a model wrote: its text need not tokenise back to them.

    ids: with the end token where the model wrote one; an answer cut at its limit has none. weights: what each token's
    loss is multiplied with; empty where all are 1. enable_thinking: how the chat template asked for the answer; None
    for its default.
    """

    ids: tuple[int, ...]
    weights: tuple[float, ...] = ()
    enable_thinking: bool | None = None


@dataclass(frozen=True)
class Message:
    """One turn: `role` is one of ROLES, `parts` are text and images in order.

    weight: scales the loss of an assistant turn, 0 for one that is read and not trained on;
    without meaning in other turns.
    reasoning, tool_calls: what an assistant turn says beside its text; calls in OpenAI's form, arguments as objects.
    answers: `name` and `tool_call_id` of a tool's turn, where they are given.
    tokens: the last answer as token ids, which are trained on in place of its text.
    """

    role: str
    parts: tuple[Part, ...]
    weight: float = 1.0
    reasoning: str = ""
    tool_calls: tuple[dict[str, Any], ...] = ()
    answers: dict[str, str] = field(default_factory=dict)
    tokens: AnswerTokens | None = None

    @property
    def supervised(self) -> bool:
        """Whether the turn is trained on."""
        return self.role == "assistant" and self.weight > 0

    @property
    def text(self) -> str:
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def template_fields(self) -> dict[str, Any]:
        """Everything but role and content, under the names that chat templates read."""
        reasoning = {"reasoning_content": self.reasoning} if self.reasoning else {}
        calls = {"tool_calls": list(self.tool_calls)} if self.tool_calls else {}
        return reasoning | calls | self.answers


@dataclass(frozen=True)
class Record:
    """One conversation.

    weight multiplies the source's weight; metadata is everything else the file says (grounding boxes, ids, source);
    tools are the schemas of the functions that may be called.
    """

    messages: tuple[Message, ...]
    metadata: dict[str, Any] = field(default_factory=dict)
    weight: float = 1.0
    tools: tuple[dict[str, Any], ...] = ()

    @property
    def images(self) -> list[ImageRef]:
        return [part for message in self.messages for part in message.parts if isinstance(part, ImageRef)]
