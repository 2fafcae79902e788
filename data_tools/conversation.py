"""Conversations as they are found (messages or ShareGPT) brought into one shape: turns of text and images in order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

IMAGE_MARK = "<image>"
_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
}


class DropError(ValueError):
    """A record or turn that is left out; the message is the reason it is counted under."""


@dataclass(frozen=True)
class Turn:
    """One message: role is system, user or assistant; parts are ("text", text) or ("image", path) in order."""

    role: str
    parts: tuple[tuple[str, str], ...]

    @property
    def text(self) -> str:
        return "".join(value for kind, value in self.parts if kind == "text")

    @property
    def images(self) -> list[str]:
        return [value for kind, value in self.parts if kind == "image"]


def read_turns(record: Any) -> list[Turn]:
    """Turns of one record. Raises DropError with the reason for what is neither messages nor ShareGPT.

    Image placeholders `<image>` in texts stand for the record's `images` (or `image`) in order; images that no text
    names come first in the first user turn, as the common loaders have it.
    """
    if not isinstance(record, dict):
        raise DropError("not a JSON object")
    messages = record.get("messages", record.get("conversations"))
    if not isinstance(messages, list) or not messages:
        raise DropError("no messages or conversations")
    pending = _image_list(record)
    turns = []
    for message in messages:
        if not isinstance(message, dict):
            raise DropError("a message is no object")
        name = str(message.get("role", message.get("from", ""))).lower()
        role = _ROLES.get(name)
        if role is None:
            raise DropError(f"unknown role {name[:20]!r}")
        turns.append(Turn(role, tuple(_parts(message.get("content", message.get("value")), pending))))
    if pending:
        first = next((index for index, turn in enumerate(turns) if turn.role == "user"), None)
        if first is None:
            raise DropError("no user turn")
        images = tuple(("image", path) for path in pending)
        turns[first] = Turn("user", images + turns[first].parts)
    return turns


def _image_list(record: dict[str, Any]) -> list[str]:
    value = record.get("images", record.get("image"))
    if value is None:
        return []
    values = value if isinstance(value, list) else [value]
    return [_image_path(entry) for entry in values]


def _image_path(entry: Any) -> str:
    if isinstance(entry, dict):
        entry = entry.get("path", entry.get("url", entry.get("image")))
        if isinstance(entry, dict):
            entry = entry.get("url")
    if not isinstance(entry, str) or not entry:
        raise DropError("an image is no path")
    if entry.startswith(("http:", "https:", "data:")):
        raise DropError("an image is a URL or inline data, not a file")
    return entry.removeprefix("file://")


def _parts(content: Any, pending: list[str]) -> list[tuple[str, str]]:
    """Parts of one message; takes the images that its placeholders stand for from `pending`."""
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise DropError("a message has no content")
    parts: list[tuple[str, str]] = []
    for item in content:
        kind = item.get("type") if isinstance(item, dict) else None
        if kind == "text" and isinstance(item.get("text"), str):
            pieces = item["text"].split(IMAGE_MARK)
            for index, piece in enumerate(pieces):
                if index:
                    if not pending:
                        raise DropError("more image placeholders than images")
                    parts.append(("image", pending.pop(0)))
                    piece = piece.removeprefix("\n")
                if piece:
                    parts.append(("text", piece))
        elif kind in ("image", "image_url"):
            value = item.get("image", item.get("image_url", item.get("url", item.get("path"))))
            if value is None and pending:  # a bare {"type": "image"} stands for the next of `images`
                parts.append(("image", pending.pop(0)))
            else:
                parts.append(("image", _image_path(value)))
        else:
            raise DropError(f"unknown content type {str(kind)[:20]!r}")
    return parts
