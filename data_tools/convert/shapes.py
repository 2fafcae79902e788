"""Conversations as they are found (messages or ShareGPT) brought into one shape: turns of text and images in order.

What the trainer's own reader (pixelprune/records/reader.py) takes is read here to the same turns; beyond that, some
shapes that it refuses are understood.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

_IMAGE_MARK = re.compile(r"<image>|<img>(.*?)</img>", re.DOTALL)
_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
}

_SUPERVISION = ("loss", "train", "weight")
_UNREAD = (
    "tools", "functions", "tool_calls", "function_call", "reasoning_content", "videos", "video", "audios", "audio",
)  # fmt: skip
"""Keys of a record or a turn that belong to the conversation, but that neither this nor the trainer reads."""

Part = tuple[str, str]
"""("text", text) or ("image", path)."""


class DropError(ValueError):
    """A record or turn that is left out; the message is the reason it is counted under."""


def check_unicode(texts: Iterable[str]) -> None:
    """Raise DropError for texts that no UTF-8 file can hold: JSON may spell half of a surrogate pair."""
    try:
        for text in texts:
            text.encode()
    except UnicodeEncodeError as error:
        raise DropError("not valid Unicode") from error


@dataclass(frozen=True)
class Turn:
    """One message: role is system, user or assistant; parts are ("text", text) or ("image", path) in order.

    supervised: an answer is trained on.
    """

    role: str
    parts: tuple[Part, ...]
    supervised: bool = True

    @property
    def text(self) -> str:
        return "".join(value for kind, value in self.parts if kind == "text")

    @property
    def images(self) -> list[str]:
        return [value for kind, value in self.parts if kind == "image"]


def read_turns(record: Any) -> list[Turn]:
    """Turns of one record. Raises DropError with the reason for what is neither messages nor ShareGPT.

    Image placeholders `<image>` in texts stand for the record's `images` (or `image`) in order, `<img>a.png</img>` for
    the path inside; images that no text names come first in the first user turn, as the common loaders have it. A key
    whose value is null counts as absent.
    """
    if not isinstance(record, dict):
        raise DropError("not a JSON object")
    record = _present(record)
    is_sharegpt = "conversations" in record
    messages = record["conversations"] if is_sharegpt else record.get("messages")
    if not isinstance(messages, list) or not messages:
        raise DropError("no messages or conversations")
    pending = _image_list(record)
    turns = []
    role_keys, content_keys = (("from", "role"), ("value", "content"))
    if not is_sharegpt:
        role_keys, content_keys = role_keys[::-1], content_keys[::-1]
    for message in messages:
        if not isinstance(message, dict):
            raise DropError("a message is no object")
        message = _present(message)
        name = str(_first(message, role_keys) or "").lower()
        role = _ROLES.get(name)
        if role is None:
            raise DropError(f"unknown role {name[:20]!r}")
        turns.append(Turn(role, tuple(_parts(_first(message, content_keys), pending)), _is_supervised(message, role)))
    turns = _system_turn(record.get("system", ""), turns) + turns
    if pending:
        first = next((index for index, turn in enumerate(turns) if turn.role == "user"), None)
        if first is None:
            raise DropError("no user turn")
        images = tuple(("image", path) for path in pending)
        turns[first] = replace(turns[first], parts=images + turns[first].parts)
    return turns


def _present(mapping: dict[str, Any]) -> dict[str, Any]:
    """Rows from tables carry null for keys that other rows have. Raises DropError for keys that would be lost."""
    for key in _UNREAD:
        if mapping.get(key) not in (None, "", "[]", [], {}):
            raise DropError(f"{key!r}, which is not read")
    return {key: value for key, value in mapping.items() if value is not None}


def _system_turn(system: Any, turns: list[Turn]) -> list[Turn]:
    """The record's `system`, unless it is empty or repeats the first turn."""
    if not isinstance(system, str):
        raise DropError("system is no text")
    if system and turns and turns[0].role == "system":
        if turns[0].text != system:
            raise DropError("two different system prompts")
        return []
    return [Turn("system", (("text", system),))] if system else []


def _is_supervised(message: dict[str, Any], role: str) -> bool:
    given = {key: message[key] for key in _SUPERVISION if key in message}
    for key, value in given.items():
        if isinstance(value, str) or value not in (0, 1) or (value and role != "assistant"):
            raise DropError(f"{key!r} of a turn is not 0 or 1, or of a turn that is no answer")
    return all(given.values())


def _first(mapping: dict[str, Any], keys: tuple[str, ...]) -> Any:
    """The value of the first of these keys that is there, else None."""
    return next((mapping[key] for key in keys if key in mapping), None)


def _image_list(record: dict[str, Any]) -> list[str]:
    value = record.get("images", record.get("image", []))
    values = value if isinstance(value, list) else [value]
    return [_image_path(entry) for entry in values if entry is not None]


def _image_path(entry: Any) -> str:
    if isinstance(entry, dict):
        entry = entry.get("path") or entry.get("url") or entry.get("image")
        if isinstance(entry, dict):
            entry = entry.get("url")
    if not isinstance(entry, str) or not entry:
        raise DropError("an image is no path")
    if entry.startswith(("http:", "https:", "data:")):
        raise DropError("an image is a URL or inline data, not a file")
    return entry.removeprefix("file://")


def _parts(content: Any, pending: list[str]) -> list[Part]:
    """Parts of one message; takes the images that its placeholders stand for from `pending`."""
    if isinstance(content, str):
        return list(_split_text(content, pending))
    if not isinstance(content, list):
        raise DropError("a message has no content")
    parts: list[Part] = []
    for item in content:
        if isinstance(item, str):
            item = {"type": "text", "text": item}
        if not isinstance(item, dict):
            raise DropError("a content part is no object")
        parts += _typed_part(_present(item), pending)
    return parts


def _typed_part(item: dict[str, Any], pending: list[str]) -> list[Part]:
    kind = item.get("type", "text" if "text" in item else "image")
    if kind == "text" and isinstance(item.get("text"), str):
        text = item["text"]
        # Typed texts mean what they say, unless the record has images that nothing else stands for.
        return list(_split_text(text, pending)) if pending and "<image>" in text else [("text", text)] * bool(text)
    if kind in ("image", "image_url"):
        value = _first(item, ("image", "image_url", "path", "url"))
        if value is None and pending:  # a bare {"type": "image"} stands for the next of `images`
            return [("image", pending.pop(0))]
        return [("image", _image_path(value))]
    raise DropError(f"unknown content type {str(kind)[:20]!r}")


def _split_text(text: str, pending: list[str]) -> Iterator[Part]:
    cut = 0
    for match in _IMAGE_MARK.finditer(text):
        if match.start() > cut:
            yield "text", text[cut : match.start()]
        if match.group(1) is not None:
            yield "image", _image_path(match.group(1).strip())
        elif pending:
            yield "image", pending.pop(0)
        else:
            raise DropError("more image placeholders than images")
        cut = match.end() + text.startswith("\n", match.end())  # the line break belongs to the mark
    if cut < len(text):
        yield "text", text[cut:]
