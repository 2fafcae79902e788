"""Which keys of a record are read, which say nothing about training, and what becomes of all others: one list.

What a record says is read or refused. A key that no reader here knows could be anything (a mask, a preference, a size),
so it is refused by name unless it stands in `HARMLESS` or the user has named it (`data.ignore_keys`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pixelprune.records.record import RecordError

__all__ = ["HARMLESS", "NO_RULES", "PREFERENCE_KEYS", "STRUCTURE", "KeyCounts", "KeyRules", "Level", "is_empty"]

Level = Literal["record", "turn", "part", "image", "object"]
"""Where a key stands: in the record, in a turn, in a content part of a turn, in an object that gives an image, in
`objects`."""
Verdict = Literal["read", "ignored", "refused"]

KeyCounts = Counter[tuple[Level, str, Verdict]]

_NAMES = ("id", "uid", "uuid", "idx", "index", "name")
_SIZES = ("width", "height", "image_width", "image_height", "image_size", "image_sizes", "img_size")
_FORMATS = ("format", "mime_type", "media_type", "filename", "file_name", "md5", "sha256")
HARMLESS: dict[Level, frozenset[str]] = {
    "record": frozenset(
        (
            *_NAMES, "image_id", "question_id", "sample_id", "conversation_id", "episode_id", "step_id", "page",
            *_SIZES, "viewport", "md5", "sha256",
            "source", "data_source", "dataset", "dataset_name", "origin", "split", "subset", "version", "license",
            "url", "created", "timestamp", "author", "annotator", "model", "generator",
            "tag", "tags", "category", "categories", "group", "domain", "topic", "task", "task_type", "data_type",
            "language", "lang", "platform", "application", "ui_type", "element", "difficulty", "num_turns",
            "point",
        )
    ),
    "turn": frozenset(("id", "uid", "uuid", "idx", "index", "turn_id", "message_id", "timestamp", "created", "lang")),
    "part": frozenset(("id", "idx", "index", *_SIZES, *_FORMATS, "cache_control")),
    "image": frozenset(("id", "image_id", "idx", "index", *_SIZES, *_FORMATS)),
    "object": frozenset(("id", *_SIZES)),
}  # fmt: skip
"""Ids, sizes as they are, sources and tags: they describe, and nothing is computed from them. Kept in the metadata."""

PREFERENCE_KEYS = frozenset(
    ("chosen", "rejected", "chosen_response", "rejected_response", "rejected_messages", "rejected_images", "kto_tag")
)
"""Keys of a record that make it preference data, as TRL, ms-swift and LLaMA-Factory write them; and a true or false
`label`, which is KTO's."""

ADVICE = {
    "tools": "it stands beside the turns",
    "functions": "give them as tools",
    "tool_calls": "only assistant turns call",
    "function_call": "give it as tool_calls",
    **dict.fromkeys(("reasoning_content", "reasoning", "thinking"), "only assistant turns reason"),
    **dict.fromkeys(("videos", "video"), "only images are supported (data_tools recording makes images of a video)"),
    **dict.fromkeys(("audios", "audio"), "only images are supported"),
    **dict.fromkeys(
        ("max_pixels", "min_pixels", "resized_height", "resized_width"), "a size is stated in the image's own part"
    ),
    "detail": "give the size in pixels (max_pixels)",
    "train_detail": "only whole turns can be left out of training (loss, train or weight of a turn)",
    "chat_template_kwargs": "the chat template is called without arguments of its own",
}
"""What to do about keys that have a known meaning elsewhere and are not read here."""

STRUCTURE = frozenset(
    ("conversations", "messages", "images", "from", "role", "value", "content", "type", "text", "image", "image_url",
     "path", "url", "base64", "bytes")
)  # fmt: skip
"""Keys that are the conversation itself, which cannot be ignored."""


def is_empty(value: Any) -> bool:
    """Whether a key says nothing. Tables have an empty value where other rows have one; as JSON, two brackets."""
    return value is None or (isinstance(value, str | list | tuple | dict) and value in ("", "[]", "{}", [], (), {}))


@dataclass(frozen=True)
class KeyRules:
    """What becomes of keys that are not read.

    ignore: keys that the user has named as of no meaning, at whatever level they stand. seen: counts every key that is
    not empty by (level, key, verdict), for a report; left alone without one.
    Raises ValueError when `ignore` names a key that is the conversation itself.
    """

    ignore: frozenset[str] = frozenset()
    seen: KeyCounts | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        wrong = sorted(self.ignore & STRUCTURE)
        if wrong:
            raise ValueError(
                f"{', '.join(wrong)}: part of the conversation itself, cannot be ignored (data.ignore_keys)"
            )

    @classmethod
    def ignoring(cls, keys: Iterable[str]) -> KeyRules:
        return cls(frozenset(keys))

    def checked(self, mapping: Mapping[Any, Any], level: Level, read: Collection[str]) -> dict[Any, Any]:
        """The mapping without ignored keys and without None, which means absent in rows of tables.

        read: the keys that the caller reads. Raises RecordError with reason unread_key.
        """
        kept, refused = {}, []
        for key, value in mapping.items():
            if value is None:
                continue
            verdict: Verdict = "read"
            if key in self.ignore:
                verdict = "ignored"
            else:
                kept[key] = value
                if key not in read:
                    is_fine = key in HARMLESS[level] or is_empty(value)
                    verdict = "ignored" if is_fine else "refused"
            if verdict == "refused":
                refused.append(key)
            if self.seen is not None and not is_empty(value):
                self.seen[level, str(key), verdict] += 1
        if refused:
            raise _refusal(refused[0], level)
        return kept

    def refuse_preferences(self, record: Mapping[Any, Any]) -> None:
        """Raises RecordError with reason preference_data for a record whose answers are compared, or judged."""
        for key, value in record.items():
            is_judged = key in PREFERENCE_KEYS or (key == "label" and isinstance(value, bool))
            if is_judged and key not in self.ignore and not is_empty(value):
                if self.seen is not None:
                    self.seen["record", key, "refused"] += 1
                raise RecordError(
                    "preference_data",
                    f"a record has {key!r}: preference data, which needs another objective than this trainer has; "
                    "keep the answers to be learnt as turns and remove the key",
                )

    def knows(self, key: str, level: Level, read: Collection[str]) -> bool:
        """Whether there is a rule for a key, be it refusal, so that nobody need ask what it is."""
        named = key in self.ignore or key in PREFERENCE_KEYS or key in ADVICE or key == "label"
        return named or key in read or key in HARMLESS[level]


NO_RULES = KeyRules()
"""Nothing ignored beyond `HARMLESS`."""


def _refusal(key: Any, level: Level) -> RecordError:
    where = {"part": "a content part", "image": "an image", "object": "objects"}.get(level, f"a {level}")
    advice = f"{ADVICE[key]}, or " if key in ADVICE else ""
    return RecordError(
        "unread_key",
        f"{where} has {key!r:.80}, which is not read: {advice}remove the key, or name it in data.ignore_keys if it "
        "says nothing about training",
    )
