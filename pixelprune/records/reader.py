"""Rows of the common formats -> `Record`, detected per record.

sharegpt   {"conversations": [{"from": "human", "value": "<image>What is it?"}, ...], "images": ["a.png"]}
           or with inline paths: {"from": "human", "value": "<img>a.png</img>What is it?"}
messages   {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"},
                                                      {"type": "text", "text": "What is it?"}]}, ...]}
           with `image_url` parts (OpenAI), `source` parts (Anthropic), `value` parts (LLaMA-Factory), parts without a
           source that take the next of `images`, or plain strings; without any mark, `images` come first (TRL).

In both, `system` beside the turns is a system turn in front of them, and a turn's `loss`, `train`, `weight`, ... says
whether it is trained on, or how much. A last answer with `token_ids` is trained on by these
(pixelprune/records/token_answers.py). An image stands exactly where its mark stood: the line break that ShareGPT files
write behind `<image>` is text of the prompt, as LLaMA-Factory and ms-swift have it. Every key is read, known to say
nothing about training, named by the user, or refused (pixelprune/records/keys.py): left out in silence it would train
another task. Rows from Arrow and Parquet carry None for keys another row has: None always means absent.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from pixelprune.records.agents import (
    CALL_ROLES,
    REASONING_KEYS,
    REASONING_PARTS,
    TOOL_ROLES,
    reasoning_of,
    tool_calls_of,
    tools_of,
)
from pixelprune.records.image_part import IMAGE_KEYS, image_of_part, image_ref, read_keys
from pixelprune.records.keys import NO_RULES, KeyRules
from pixelprune.records.marks import image_marks
from pixelprune.records.objects import with_objects
from pixelprune.records.record import ImageRef, Message, Part, Record, RecordError, of_the_record
from pixelprune.records.shapes import CALL_PART, as_messages, of_value_part
from pixelprune.records.token_answers import MAX_WEIGHT, MIN_WEIGHT, TOKEN_KEYS, answer_tokens_of

__all__ = [
    "BOX_KEYS",
    "FORMATS",
    "RECORD_KEYS",
    "SHAREGPT_ROLES",
    "SUPERVISION_KEYS",
    "parse_record",
]

FORMATS = ("auto", "sharegpt", "messages")
SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system",
    "developer": "system", **dict.fromkeys(CALL_ROLES, "assistant"), **dict.fromkeys(TOOL_ROLES, "tool"),
}  # fmt: skip
MESSAGE_ROLES = {name: role for name, role in SHAREGPT_ROLES.items() if name not in ("human", "gpt")}
"""Names of the turns' writers -> the role of the turn. A developer's turn is what a system turn used to be."""
BOX_KEYS = ("bbox", "bboxes")
SUPERVISION_KEYS = ("loss", "train", "weight", "training", "trainable", "loss_scale", "loss_weight")
"""ms-swift's, OpenAI's, axolotl's and their kind: how much a turn is trained on."""
_CONVERSATIONS = ("conversations", "messages")
_NOT_METADATA = (*_CONVERSATIONS, "images", "image", "system", "metadata", "weight", "tools", "objects")
RECORD_KEYS = (*_NOT_METADATA, *BOX_KEYS)
_TURN_KEYS = ("role", "content", *SUPERVISION_KEYS)
_ROLE_KEYS = {"assistant": (*REASONING_KEYS, "tool_calls", *TOKEN_KEYS), "tool": ("name", "tool_call_id")}
_TEXT_KEYS = ("type", "text")
_IMAGE_PART_KEYS = ("type", *IMAGE_KEYS)


def parse_record(row: Any, record_format: str = "auto", rules: KeyRules = NO_RULES) -> Record:
    """One row (a mapping) as a Record.

    Raises RecordError with reason not_an_object, unknown_format, empty_conversation, unknown_role, bad_content,
    empty_turn, image_count, remote_image, bad_image, bad_size, image_in_answer, two_systems, preference_data,
    unread_key, bad_box, bad_objects, object_count, bad_tools, bad_weight, bad_token_ids, out_of_memory or unexpected.
    """
    if record_format not in FORMATS:
        raise ValueError(f"unknown format {record_format!r}, expected one of {', '.join(FORMATS)} (sources[].format)")
    with of_the_record():
        return _parsed(row, record_format, rules)


def _parsed(row: Any, record_format: str, rules: KeyRules) -> Record:
    if not isinstance(row, dict):
        raise RecordError("not_an_object", f"expected an object with messages, got {type(row).__name__}")
    rules.refuse_preferences(row)
    row = as_messages(row, rules) if record_format != "sharegpt" else row
    key = _conversation_key(row, record_format)
    if row.get(key) is None:
        raise RecordError("unknown_format", f"no {key!r} among the keys {sorted(map(str, row))}")
    row = rules.checked(row, "record", RECORD_KEYS)
    turns = _from_json(row[key]) if isinstance(row[key], str) else row[key]
    if not isinstance(turns, list | tuple):
        raise RecordError("bad_content", f"{key!r} is {type(turns).__name__}, expected a list of turns")
    supply = _ImageSupply(row, rules)
    roles = SHAREGPT_ROLES if key == "conversations" else MESSAGE_ROLES
    read = [_read_turn(turn, roles, supply) for turn in turns]
    if key == "messages":
        read = _with_images_in_front(read, turns, supply)
    messages = _with_calls_joined(read)
    messages = [*_system_turn(row.get("system", ""), messages), *messages]
    supply.check_all_used()
    messages = with_objects(messages, row.get("objects"), rules)
    _check_turns(messages)
    return Record(tuple(messages), _metadata(row), _weight(row), tools_of(row.get("tools")))


def _from_json(text: str) -> Any:
    """Turns that a table holds as JSON text, as UGround's does; other text as it is, which no turns are."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _conversation_key(row: dict[str, Any], record_format: str) -> str:
    if record_format != "auto":
        return "conversations" if record_format == "sharegpt" else "messages"
    if all(row.get(key) for key in _CONVERSATIONS):
        raise RecordError(
            "unread_key",
            "a record has both 'conversations' and 'messages', of which one would not be read: remove one, or say "
            "which is meant (sources[].format)",
        )
    return "messages" if row.get("messages") or row.get("conversations") is None else "conversations"


class _ImageSupply:
    """The record's image list, handed out placeholder by placeholder."""

    def __init__(self, row: dict[str, Any], rules: KeyRules):
        listed, single = (_listed(row.get(key)) for key in ("images", "image"))
        if listed and single and not (all(isinstance(image, str) for image in listed + single) and listed == single):
            raise RecordError("unread_key", "a record has 'images' and another 'image': give one of them")
        self.images = listed or single
        self.rules = rules
        self.num_used = 0

    def next(self, part: Mapping[str, Any] | None = None) -> ImageRef:
        """The next image. part: the typed part that it goes to, which may state its size."""
        self.num_used += 1
        if self.num_used > len(self.images):
            # Count on, so that the message can say how many there are; check_all_used refuses the record.
            return ImageRef("")
        return image_ref(self.images[self.num_used - 1], self.rules, part)

    def take_all(self) -> list[ImageRef]:
        return [self.next() for _ in self.images[self.num_used :]]

    def check_all_used(self) -> None:
        if self.num_used != len(self.images):
            raise RecordError(
                "image_count",
                f"{self.num_used} placeholders in the text, {len(self.images)} images"
                " (<image> in a tool's text is text: give its screenshots as typed parts)",
            )


def _listed(images: Any) -> list[Any]:
    if isinstance(images, str) and not images:  # LLaVA's text-only records
        return []
    listed = list(images) if isinstance(images, list | tuple) else [images]
    return [image for image in listed if image is not None]


def _read_turn(turn: Any, roles: dict[str, str], supply: _ImageSupply) -> Message:
    turn = _turn_object(turn, supply.rules, ("from", "value") if roles is SHAREGPT_ROLES else ())
    name = turn.get("from", turn.get("role"))
    if not isinstance(name, str) or name not in roles:
        raise RecordError("unknown_role", f"role {name!r}, expected one of {', '.join(roles)}")
    role, content = roles[name], turn.get("value", turn.get("content"))
    if (tokens := answer_tokens_of(turn, content)) is not None:
        return Message(role, (content,) if content else (), _turn_weight(turn, role), tokens=tokens)
    reasoning, calls = reasoning_of(turn), tool_calls_of(turn.get("tool_calls"), supply.rules)
    if name in CALL_ROLES and not calls:
        content, calls = "", tool_calls_of(content, supply.rules)
    parts: list[Part] = []
    if isinstance(content, str):
        # What a tool says is text, whatever it says: it neither takes images from the record nor names files.
        parts = [content] if role == "tool" else list(_split_text(content, supply))
    elif isinstance(content, list | tuple):
        thoughts, others = _reasoning_parts(list(map(of_value_part, content)), role, supply.rules)
        called, others = _call_parts(others, role, supply.rules)
        calls += called
        if thoughts and reasoning:
            raise RecordError("bad_content", "a turn holds several reasonings: give one of them")
        reasoning = reasoning or thoughts
        parts = [_typed_part(part, role, supply) for part in others]
    elif content is not None or not calls:
        raise RecordError("bad_content", f"{role} turn: content is {type(content).__name__}, expected text or parts")
    answers = {key: str(turn[key]) for key in _ROLE_KEYS["tool"] if role == "tool" and key in turn}
    parts = [part for part in parts if part != ""]
    return Message(role, tuple(parts), _turn_weight(turn, role), reasoning, calls, answers)


def _with_images_in_front(messages: list[Message], turns: Any, supply: _ImageSupply) -> list[Message]:
    """Images that no mark of the whole record stands for come before the first user turn's text, if that is a string.

    So TRL (huggingface/trl, prepare_multimodal_messages of trl/data_utils.py, commit f2cd577) and ms-swift have it.
    """
    if supply.num_used or not supply.images:
        return messages
    for place, (message, turn) in enumerate(zip(messages, turns, strict=True)):
        if message.role == "user" and isinstance(turn.get("content"), str):
            in_front = replace(message, parts=(*supply.take_all(), *message.parts))
            return [*messages[:place], in_front, *messages[place + 1 :]]
        if message.role == "user":
            break
    return messages


def _reasoning_parts(parts: Any, role: str, rules: KeyRules) -> tuple[str, list[Any]]:
    """The reasoning among an answer's typed parts, and the other parts."""
    thoughts, others = [], []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if role != "assistant" or kind not in REASONING_PARTS:
            others.append(part)
            continue
        read = rules.checked(part, "part", ("type", "text", kind, "signature"))
        said = [read[key] for key in (kind, "text") if key in read]
        if len(said) != 1 or not isinstance(said[0], str):
            raise RecordError("bad_content", f"{role} turn: a {kind} part holds {said!r:.60}, expected one text")
        thoughts.append(said[0])
    return "\n".join(thoughts), others


def _call_parts(parts: list[Any], role: str, rules: KeyRules) -> tuple[tuple[dict[str, Any], ...], list[Any]]:
    """The calls among an answer's typed parts, and the other parts."""
    calls, others = list[dict[str, Any]](), []
    for part in parts:
        if role == "assistant" and isinstance(part, dict) and part.get("type") == CALL_PART:
            calls += tool_calls_of(rules.checked(part, "part", ("type", CALL_PART)).get(CALL_PART), rules)
        else:
            others.append(part)
    return tuple(calls), others


def _with_calls_joined(messages: list[Message]) -> list[Message]:
    """Calls that stand in turns of their own go to the assistant's turn in front of them: one turn, as spoken."""
    joined: list[Message] = []
    calls: dict[int, list[dict[str, Any]]] = {}
    for message in messages:
        before = joined[-1] if joined else None
        is_call = message.role == "assistant" and message.tool_calls and not message.parts and not message.reasoning
        if before is not None and before.role == "assistant" and is_call:
            if before.weight != message.weight:
                raise RecordError("bad_weight", "a call and the turn that it belongs to have different loss weights")
            calls.setdefault(len(joined) - 1, list(before.tool_calls)).extend(message.tool_calls)
        else:
            joined.append(message)
    return [replace(m, tool_calls=tuple(calls[i])) if i in calls else m for i, m in enumerate(joined)]


def _turn_object(turn: Any, rules: KeyRules, more_keys: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise RecordError("bad_content", f"a turn is {type(turn).__name__}, expected an object")
    turn = dict(turn)
    for other, key in (("from", "role"), ("value", "content")):
        if turn.get(other) is not None and turn.get(key) is not None:
            # The same thing said in both dialects.
            if turn[other] != turn[key] and SHAREGPT_ROLES.get(str(turn[other])) != turn[key]:
                raise RecordError("unread_key", f"a turn has {other!r} and another {key!r}: give one of them")
            del turn[other]
    role = SHAREGPT_ROLES.get(str(turn.get("from", turn.get("role"))), "")
    return rules.checked(turn, "turn", (*_TURN_KEYS, *_ROLE_KEYS.get(role, ()), *more_keys))


def _system_turn(system: Any, messages: list[Message]) -> list[Message]:
    """The record's `system`, unless it is empty or repeats the first turn."""
    if not isinstance(system, str):
        raise RecordError("bad_content", f"system is {type(system).__name__}, expected a string")
    if system and messages and messages[0].role == "system":
        if messages[0].text != system:
            raise RecordError("two_systems", "the record's system and its first turn are different system prompts")
        return []
    return [Message("system", (system,), 0.0)] if system else []


def _turn_weight(turn: dict[str, Any], role: str) -> float:
    """What the loss of an answer is multiplied with, as float32 holds it; other turns are never trained on."""
    product = 1.0
    for key in SUPERVISION_KEYS:
        value = turn.get(key)
        if value is None:
            continue
        if not isinstance(value, int | float) or not (value == 0 or MIN_WEIGHT <= value < MAX_WEIGHT):
            raise RecordError(
                "bad_weight",
                f"{role} turn: {key} {value!r:.40}, expected false, true, 0, or a number from {MIN_WEIGHT:g} to "
                f"{MAX_WEIGHT:g}",
            )
        if value and role != "assistant":
            raise RecordError("bad_weight", f"{role} turn: {key} is {value!r}; only assistant turns are trained on")
        product *= value
    return float(np.float32(product)) if role == "assistant" else 0.0


def _split_text(text: str, supply: _ImageSupply) -> Iterator[Part]:
    cut = 0
    for start, end, name in image_marks(text):
        if start > cut:
            yield text[cut:start]
        yield supply.next() if name is None else image_ref(name.strip(), supply.rules)
        cut = end
    if cut < len(text):
        yield text[cut:]


def _typed_part(part: Any, role: str, supply: _ImageSupply) -> Part:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise RecordError("bad_content", f"{role} turn: a part is {type(part).__name__}, expected an object")
    kind = part.get("type")
    if kind is None:
        kind = "text" if part.get("text") is not None else "image"
    if kind == "text":
        part = supply.rules.checked(part, "part", _TEXT_KEYS)
        text = part.get("text")
        if not isinstance(text, str):
            raise RecordError("bad_content", f"{role} turn: a text part holds {text!r:.60}")
        return text
    if kind in ("image", "image_url"):
        part = read_keys(part, _IMAGE_PART_KEYS, supply.rules, "part")
        return image_of_part(part, supply.rules) or supply.next(part)
    way_out = "; data_tools recording makes images of a video" if kind in ("video", "video_url") else ""
    raise RecordError("bad_content", f"{role} turn: part of type {kind!r:.60}, expected text or image{way_out}")


def _check_turns(messages: list[Message]) -> None:
    if not messages:
        raise RecordError("empty_conversation", "no turns")
    for message in messages:
        has_image = any(isinstance(part, ImageRef) for part in message.parts)
        if message.role == "assistant" and has_image:
            raise RecordError("image_in_answer", "an assistant turn holds an image, which no model here can predict")
        if not (message.parts or message.tool_calls or message.tokens) and message.role != "tool":
            raise RecordError("empty_turn", f"a {message.role} turn is empty")


def _weight(row: dict[str, Any]) -> float:
    weight = row.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < 1e6:
        raise RecordError("bad_weight", f"weight {weight!r:.40}, expected a number from 0 to 1e6")
    return float(weight)


def _metadata(row: dict[str, Any]) -> dict[str, Any]:
    metadata = {key: value for key, value in row.items() if key not in _NOT_METADATA}
    stated = row.get("metadata", {})
    if not isinstance(stated, dict):
        raise RecordError("bad_content", f"metadata is {type(stated).__name__}, expected an object")
    metadata |= stated
    for key in BOX_KEYS:
        if metadata.get(key) is not None:
            _check_boxes(key, metadata[key])
    return metadata


def _check_boxes(key: str, value: Any) -> None:
    is_list = isinstance(value, list | tuple) and (key == "bboxes" if not value else isinstance(value[0], list | tuple))
    for box in value if is_list else [value]:
        if not isinstance(box, list | tuple) or len(box) != 4 or not all(map(_is_finite_number, box)):
            raise RecordError("bad_box", f"{key} {box!r:.80}, expected four finite numbers (left, top, right, bottom)")


def _is_finite_number(value: Any) -> bool:
    # Compared, not converted: JSON has integers that no float holds.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
