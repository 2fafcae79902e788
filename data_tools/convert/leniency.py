"""Conversations as they are found -> rows that the one reader (pixelprune/records/reader.py) takes.

Nothing is read here: keys and roles get the names that the reader knows, and images that no text names get a mark. A
row that the reader takes as it is comes out with the same meaning, to the line break.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pixelprune.records.image_part import IMAGE_KEYS, image_ref
from pixelprune.records.marks import image_marks

_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant"}
_MARK = "<image>"


def plain_row(record: Any) -> Any:
    """The row with `messages` of role and content. What is no row, and what is wrong in it, is left to the reader.

    Roles may be in any case and of either dialect. Images of `images` (or `image`) that no mark stands for take the
    marks in typed texts, which else mean what they say, and then come first in the first user turn, as the common
    loaders have it.
    """
    if not isinstance(record, dict):
        return record
    row = {key: value for key, value in record.items() if value is not None}
    if row.get("conversations") and row.get("messages"):
        return row  # the reader refuses it: one of the two would not be read
    key = "conversations" if row.get("conversations") or "messages" not in row else "messages"
    turns = row.get(key)
    if not isinstance(turns, list):
        return row
    del row[key]
    is_sharegpt = key == "conversations"
    row.pop("conversations" if not is_sharegpt else "messages", None)  # empty
    turns = [_plain_turn(turn, is_sharegpt) for turn in turns]
    images = _listed(row)
    num_left = len(images) - sum(map(_num_marks, turns))
    if num_left > 0:
        num_left -= _mark_typed_texts(turns, num_left)
        row["images"] = images = _with_images_in_front(turns, images, num_left)
        row.pop("image", None)
    return {**row, "messages": turns}


def _listed(row: dict[str, Any]) -> list[Any]:
    listed = row.get("images", row.get("image", []))
    return [image for image in (listed if isinstance(listed, list) else [listed]) if image is not None]


def _plain_turn(turn: Any, is_sharegpt: bool) -> Any:
    if not isinstance(turn, dict):
        return turn
    turn = {key: value for key, value in turn.items() if value is not None}
    for name, others in (("role", ("from", "role")), ("content", ("value", "content"))):
        for other in others if is_sharegpt else others[::-1]:
            if other in turn:
                value = turn[other]
                turn = {key: kept for key, kept in turn.items() if key not in others} | {name: value}
                break
    if isinstance(turn.get("role"), str):
        role = turn["role"].lower()
        turn["role"] = _ROLES.get(role, role)
    return turn


def _num_marks(turn: Any) -> int:
    """Marks in a turn that take an image of the record's list."""
    content = turn.get("content") if isinstance(turn, dict) else None
    if isinstance(content, str):
        return sum(name is None for *_, name in image_marks(content))
    return sum(map(_is_bare_image, content)) if isinstance(content, list) else 0


def _is_bare_image(part: Any) -> bool:
    if not isinstance(part, dict) or part.get("type", "text" if part.get("text") is not None else "image") == "text":
        return False
    return all(part.get(key) is None for key in IMAGE_KEYS)


def _mark_typed_texts(turns: list[Any], num_left: int) -> int:
    """Let marks in typed texts stand for up to `num_left` images; returns for how many."""
    num_marked = 0
    for turn in turns:
        content = turn.get("content") if isinstance(turn, dict) else None
        if not isinstance(content, list):
            continue
        parts: list[Any] = []
        for part in content:
            text = part.get("text") if isinstance(part, dict) else part
            if not isinstance(text, str) or _MARK not in text or num_marked == num_left:
                parts.append(part)
                continue
            *before, rest = text.split(_MARK, num_left - num_marked)
            for piece in before:
                parts += [{"type": "text", "text": piece}, {"type": "image"}]
            parts.append({"type": "text", "text": rest})
            num_marked += len(before)
        turn["content"] = parts
    return num_marked


def _with_images_in_front(turns: list[Any], images: list[Any], num_left: int) -> list[Any]:
    """Marks for the last `num_left` images in front of the first user turn; the images in the order of their marks."""
    if num_left <= 0:
        return images
    num_before = 0
    for turn in turns:
        if isinstance(turn, dict) and turn.get("role") == "user":
            content = turn.get("content")
            bare = [{"type": "image"}] * num_left
            if isinstance(content, str):
                turn["content"] = [*bare, *_split(content)]
            elif isinstance(content, list):
                turn["content"] = bare + content
            named, left = images[:-num_left], images[-num_left:]
            return [*named[:num_before], *left, *named[num_before:]]
        num_before += _num_marks(turn)
    return images  # no user turn could hold them: the reader says what is wrong


def _split(text: str) -> Iterator[Any]:
    """A text as the typed parts that the reader makes of it."""
    cut = 0
    for start, end, name in image_marks(text):
        yield {"type": "text", "text": text[cut:start]}
        yield {"type": "image"} if name is None else {"type": "image", "image": image_ref(name.strip()).source}
        cut = end
    yield {"type": "text", "text": text[cut:]}
