"""Every key of a record is read, known to say nothing, named by the user, or refused: none is dropped in silence."""

import copy
from collections import Counter

import pytest

from pixelprune.records.image_part import OBJECT_KEYS, SIZE_KEYS
from pixelprune.records.keys import HARMLESS, STRUCTURE, KeyRules
from pixelprune.records.reader import RECORD_KEYS, SUPERVISION_KEYS, parse_record
from pixelprune.records.record import RecordError

GOOD = [
    {
        "id": 3,
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": {"path": "a.png"}},
                    {"type": "image_url", "image_url": {"url": "b.png"}},
                    {"type": "text", "text": "Which?"},
                ],
            },
            {"role": "assistant", "content": "The left."},
        ],
    },
    {
        "conversations": [{"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": "The left."}],
        "images": [{"bytes": b"png", "path": "a.png"}],
    },
    {
        "messages": [
            {"role": "user", "content": "<image>Find <ref-object>"},
            {"role": "assistant", "content": "<bbox>"},
        ],
        "images": ["a.png"],
        "objects": {"ref": ["the menu"], "bbox": [[1, 2, 3, 4]]},
    },
]


def objects_of(value, level="record"):
    """(level, object) for every object of a record, of which the test may change any."""
    yield level, value
    if level == "record" and "objects" in value:
        yield "object", value["objects"]
    for key in ("messages", "conversations"):
        for turn in value.get(key, []) if level == "record" else []:
            yield from objects_of(turn, "turn")
    for part in value.get("content", []) if level == "turn" else []:
        if isinstance(part, dict):
            yield from objects_of(part, "part")
    for image in value.get("images", []) if level == "record" else [value.get("image"), value.get("image_url")]:
        if isinstance(image, dict) and level in ("record", "part"):
            yield "image", image


def is_read(key, level, place):
    """Where a key that is refused elsewhere belongs: reasoning and calls in an answer, tools beside the turns, sizes
    with an image."""
    if key in SIZE_KEYS:
        return level == "image" or (level == "part" and "text" not in place)
    in_answer = level == "turn" and (place.get("role") == "assistant" or place.get("from") == "gpt")
    answers_keys = ("thinking", "reasoning", "reasoning_content", "tool_calls")
    return (key == "tools" and level == "record") or (in_answer and key in answers_keys)


PLACES = [(g, i, level) for g, good in enumerate(GOOD) for i, (level, _) in enumerate(objects_of(copy.deepcopy(good)))]
UNKNOWN = {
    "surprise": "x", "max_pixels": 16384, "min_pixels": 1,
    "detail": "low", "thinking": "a", "reasoning": "a", "reasoning_content": "a", "train_detail": [{"train": False}],
    "chat_template_kwargs": {"enable_thinking": True}, "tools": [{"name": "press"}], "tool_calls": [{"name": "press"}],
    "videos": ["a.mp4"], "mask": 0, "flag": False, "rate": 0.0,
}  # fmt: skip


def test_there_are_objects_at_every_level():
    assert Counter(level for _, _, level in PLACES) == {"record": 3, "turn": 6, "part": 3, "image": 3, "object": 1}
    for good in GOOD:
        parse_record(good)


@pytest.mark.parametrize(("number", "place", "level"), PLACES)
def test_an_unknown_key_is_refused_at_every_level_unless_the_user_names_it(number, place, level):
    for key, value in UNKNOWN.items():
        row = copy.deepcopy(GOOD[number])
        list(objects_of(row))[place][1][key] = value
        if is_read(key, level, list(objects_of(row))[place][1]):
            assert parse_record(row) != parse_record(GOOD[number]), f"{key} dropped"
            continue
        with pytest.raises(RecordError, match=repr(key)) as caught:
            parse_record(row)
        assert caught.value.reason == "unread_key", key
        assert "data.ignore_keys" in str(caught.value), "the way out"
        assert parse_record(row, rules=KeyRules.ignoring([key])) == parse_record(GOOD[number])
    for key in HARMLESS[level]:
        row = copy.deepcopy(GOOD[number])
        list(objects_of(row))[place][1].setdefault(key, "x")
        assert parse_record(row).messages == parse_record(GOOD[number]).messages


def test_a_key_of_another_kind_of_part_is_refused():
    """A text that brings an image, an image that brings a text: one of the two would be lost."""
    for part in (
        {"type": "text", "text": "a", "image": "a.png"},
        {"type": "image", "image": "a.png", "text": "a"},
        {"text": "a", "image": "a.png"},
    ):
        with pytest.raises(RecordError) as caught:
            parse_record({"messages": [{"role": "user", "content": [part]}, {"role": "assistant", "content": "b"}]})
        assert caught.value.reason == "unread_key"


def test_two_ways_to_say_it_that_differ_are_refused():
    for turn in ({"from": "human", "role": "assistant", "value": "a"}, {"from": "human", "value": "a", "content": "b"}):
        with pytest.raises(RecordError, match="give one of them"):
            parse_record({"conversations": [turn, {"from": "gpt", "value": "b"}]})
    for more in ({"image": "b.png"}, {"image": b"b"}):
        with pytest.raises(RecordError, match="give one of them"):
            parse_record(GOOD[1] | {"images": ["a.png"]} | more)
    assert parse_record(GOOD[1] | {"images": ["a.png"], "image": "a.png"}).images[0].source == "a.png"
    for image in ({"bytes": b"a", "url": "b.png"}, {"path": "a.png", "url": "b.png"}):
        with pytest.raises(RecordError, match="expected one of them"):
            parse_record(GOOD[1] | {"images": [image]})


@pytest.mark.parametrize(
    "more",
    [
        {"label": False},
        {"label": True},
        {"chosen": {"from": "gpt", "value": "better"}, "rejected": {"from": "gpt", "value": "worse"}},
        {"rejected_response": "That one."},
        {"kto_tag": True},
    ],
)
def test_preference_data_is_refused_by_name(more):
    for row in (GOOD[0] | more, GOOD[1] | more, {"prompt": "a"} | more):
        with pytest.raises(RecordError, match=f"{next(iter(more))!r}: preference data, .* another objective") as caught:
            parse_record(row)
        assert caught.value.reason == "preference_data"
    assert parse_record(GOOD[0] | more, rules=KeyRules.ignoring(more)).messages == parse_record(GOOD[0]).messages


def test_the_conversation_itself_cannot_be_ignored():
    with pytest.raises(ValueError, match=r"content, messages: part of the conversation itself"):
        KeyRules.ignoring(["messages", "content", "mood"])
    assert not STRUCTURE & {"weight", "loss", "system"}, "what a user may well want to leave out"


def test_no_key_is_both_read_and_harmless():
    """A key that is read decides; the list of those that say nothing must not hide it."""
    assert not HARMLESS["record"] & set(RECORD_KEYS)
    assert not HARMLESS["turn"] & {"role", "content", "from", "value", *SUPERVISION_KEYS}
    assert not HARMLESS["image"] & set(OBJECT_KEYS)


def test_keys_are_counted_by_what_became_of_them():
    seen = Counter()
    rules = KeyRules(frozenset(["mood"]), seen)
    parse_record(GOOD[0] | {"mood": "x", "tools": []}, rules=rules)
    with pytest.raises(RecordError):
        parse_record(GOOD[0] | {"surprise": 1}, rules=rules)
    assert seen["record", "messages", "read"] == 2
    assert seen["record", "mood", "ignored"] == 1
    assert seen["record", "id", "ignored"] == 2
    assert seen["record", "surprise", "refused"] == 1
    assert seen["turn", "role", "read"] == 2
    assert seen["image", "path", "read"] == 1
    assert not any(key == "tools" for _, key, _ in seen), "empty"
