"""Every format gives the same record; every malformed row is refused with its own reason."""

import base64
import math

import numpy as np
import pytest
from PIL import Image

from pixelprune.records.prepare import hash_content
from pixelprune.records.reader import SUPERVISION_KEYS, parse_record
from pixelprune.records.record import ImageRef, RecordError

BODY = [("user", (ImageRef("a.png"), "What is it?")), ("assistant", ("A menu.",))]


def shape(record):
    return [(message.role, message.parts) for message in record.messages]


EQUIVALENT = {
    "sharegpt with placeholders": {
        "conversations": [{"from": "human", "value": "<image>What is it?"}, {"from": "gpt", "value": "A menu."}],
        "images": ["a.png"],
    },
    "sharegpt, LLaVA's single image": {
        "conversations": [{"from": "human", "value": "<image>What is it?"}, {"from": "gpt", "value": "A menu."}],
        "image": "a.png",
    },
    "sharegpt with inline paths": {
        "conversations": [
            {"from": "human", "value": "<img>a.png</img>What is it?"},
            {"from": "gpt", "value": "A menu."},
        ]
    },
    "messages, typed": {
        "messages": [
            {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What is it?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "A menu."}]},
        ]
    },
    "messages, typed, images apart, Arrow's None": {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": None, "text": None},
                    {"type": "text", "text": "What is it?", "image": None},
                ],
            },
            {"role": "assistant", "content": "A menu."},
        ],
        "images": ["a.png"],
        "conversations": None,
    },
    "messages, OpenAI": {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": "a.png"}},
                    {"type": "text", "text": "What is it?"},
                ],
            },
            {"role": "assistant", "content": "A menu."},
        ]
    },
    "messages, strings with placeholders": {
        "messages": [
            {"role": "user", "content": "<image>What is it?"},
            {"role": "assistant", "content": "A menu."},
        ],
        "images": [{"bytes": None, "path": "a.png"}],
    },
}


@pytest.mark.parametrize("name", EQUIVALENT)
def test_formats_read_into_the_same_record(name):
    assert shape(parse_record(EQUIVALENT[name])) == BODY


def test_order_of_images_turns_and_system():
    record = parse_record(
        {
            "system": "Be brief.",
            "conversations": [
                {"from": "human", "value": "a<image>b<image>"},
                {"from": "gpt", "value": "c"},
                {"from": "human", "value": "<image>d"},
                {"from": "gpt", "value": "e"},
            ],
            "images": ["1", "2", "3"],
            "id": 7,
            "metadata": {"bbox": [0, 1, 2.5, 3]},
            "weight": 2,
        }
    )
    assert shape(record) == [
        ("system", ("Be brief.",)),
        ("user", ("a", ImageRef("1"), "b", ImageRef("2"))),
        ("assistant", ("c",)),
        ("user", (ImageRef("3"), "d")),
        ("assistant", ("e",)),
    ]
    assert [ref.source for ref in record.images] == ["1", "2", "3"]
    assert record.metadata == {"id": 7, "bbox": [0, 1, 2.5, 3]}
    assert record.weight == 2.0


TURNS = {
    "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
    "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
}


@pytest.mark.parametrize("key", TURNS)
def test_a_system_prompt_beside_the_turns_is_the_first_turn(key):
    """In every format: a prompt that is left out in silence trains another task."""
    with_prompt = [("system", ("Be brief.",)), ("user", ("q",)), ("assistant", ("a",))]
    assert shape(parse_record({key: TURNS[key], "system": "Be brief."})) == with_prompt
    assert shape(parse_record({key: TURNS[key], "system": ""})) == with_prompt[1:]
    first = {"role": "system", "content": "Be brief.", "from": "system", "value": "Be brief."}
    assert shape(parse_record({key: [first, *TURNS[key]], "system": "Be brief."})) == with_prompt
    for system, reason in (("Be long.", "two_systems"), (["Be brief."], "bad_content")):
        with pytest.raises(RecordError) as caught:
            parse_record({key: [first, *TURNS[key]], "system": system})
        assert caught.value.reason == reason


@pytest.mark.parametrize("name", SUPERVISION_KEYS)
@pytest.mark.parametrize("key", TURNS)
def test_an_answer_may_be_left_out_of_training(key, name):
    user, answer = TURNS[key]
    for value, supervised in ((0, False), (False, False), (0.0, False), (1, True), (True, True), (None, True)):
        record = parse_record({key: [user, answer, user, answer | {name: value}]})
        answers = [message.supervised for message in record.messages if message.role == "assistant"]
        assert answers == [True, supervised], value
    parse_record({key: [user | {name: 0}, answer]})
    for turns in (
        [user, answer | {name: -0.5}],
        [user, answer | {name: 1e-9}],
        [user, answer | {name: math.nan}],
        [user, answer | {name: math.inf}],
        [user, answer | {name: 10**400}],
        [user, answer | {name: "no"}],
        [user, answer | {name: [1]}],
        [user | {name: 1}, answer],
        [user | {name: 0.5}, answer],
    ):
        with pytest.raises(RecordError) as caught:
            parse_record({key: turns})
        assert caught.value.reason == "bad_weight"


@pytest.mark.parametrize("name", SUPERVISION_KEYS)
def test_weights_of_answers_are_float32_and_multiply(name):
    user, answer = TURNS["messages"]
    record = parse_record({"messages": [user, answer | {name: 0.1}, user, answer | {name: 3}, user, answer]})
    weights = [message.weight for message in record.messages if message.role == "assistant"]
    assert weights == [float(np.float32(0.1)), 3.0, 1.0]
    both = parse_record({"messages": [user, answer | {"loss": True, "loss_weight": 0.25, "weight": 0.5}]})
    assert both.messages[1].weight == 0.125


def test_empty_values_of_keys_that_are_not_read_say_nothing():
    user, answer = TURNS["messages"]
    for empty in ("", "[]", "{}", [], {}, None):
        parse_record({"messages": [user, answer | {"tool_calls": empty}], "tools": empty, "videos": empty})


def test_image_forms():
    picture = Image.new("RGB", (4, 4))
    url = "data:image/png;base64," + base64.b64encode(b"bytes").decode()
    forms = [b"bytes", {"bytes": b"bytes", "path": "x.png"}, url, picture, "file:///a/b.png"]
    record = parse_record(
        {"messages": [{"role": "user", "content": "<image>" * len(forms)}, {"role": "assistant", "content": "x"}],
         "images": forms}
    )  # fmt: skip
    assert [ref.source for ref in record.images] == [b"bytes", b"bytes", b"bytes", picture, "/a/b.png"]


USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
REFUSED = [
    ("not_an_object", [1, 2]),
    ("unknown_format", {"text": "hello"}),
    ("empty_conversation", {"messages": []}),
    ("bad_content", {"messages": "hello"}),
    ("bad_content", {"messages": ["hello"]}),
    ("bad_content", {"messages": [{"role": "user", "content": 5}, ANSWER]}),
    ("bad_content", {"messages": [{"role": "user", "content": [5]}, ANSWER]}),
    ("bad_content", {"messages": [{"role": "user", "content": [{"type": "video", "video": "v.mp4"}]}, ANSWER]}),
    ("bad_content", {"messages": [{"role": "user", "content": [{"type": "text"}]}, ANSWER]}),
    ("bad_content", {"conversations": [{"from": "human", "value": None}]}),
    ("unknown_role", {"messages": [{"role": "critic", "content": "q"}, ANSWER]}),
    ("unknown_role", {"conversations": [{"from": "alien", "value": "q"}]}),
    ("unknown_role", {"conversations": [{"from": ["human"], "value": "q"}]}),
    ("empty_turn", {"messages": [USER, {"role": "assistant", "content": ""}]}),
    ("image_count", {"messages": [{"role": "user", "content": "<image>"}, ANSWER]}),
    ("image_count", {"messages": [{"role": "user", "content": [{"type": "image"}]}, ANSWER], "images": ["a", "b"]}),
    ("image_count", {"messages": [{"role": "user", "content": "<image><image>"}, ANSWER], "images": ["a.png"]}),
    ("image_in_answer", {"messages": [USER, {"role": "assistant", "content": "<image>"}], "images": ["a.png"]}),
    ("remote_image", {"messages": [{"role": "user", "content": "<img>https://x.org/a.png</img>"}, ANSWER]}),
    ("bad_image", {"messages": [{"role": "user", "content": "<image>"}, ANSWER], "images": [{"bytes": None}]}),
    ("bad_image", {"messages": [{"role": "user", "content": "<image>"}, ANSWER], "images": [3]}),
    ("bad_image", {"messages": [{"role": "user", "content": "<image>"}, ANSWER], "images": ["data:a;base64,?"]}),
    ("bad_box", {"messages": [USER, ANSWER], "metadata": {"bbox": [0, 0, math.nan, 1]}}),
    ("bad_box", {"messages": [USER, ANSWER], "bboxes": [[0, 0, 1, 1], [0, 0, math.inf, 1]]}),
    ("bad_box", {"messages": [USER, ANSWER], "bbox": [0, 0, 1]}),
    ("bad_box", {"messages": [USER, ANSWER], "bbox": "0 0 1 1"}),
    ("bad_weight", {"messages": [USER, ANSWER], "weight": -1}),
    ("bad_weight", {"messages": [USER, ANSWER], "weight": math.nan}),
    ("bad_weight", {"messages": [USER, ANSWER], "weight": "2"}),
]  # fmt: skip


@pytest.mark.parametrize(("reason", "row"), REFUSED)
def test_refusals_have_their_reason(reason, row):
    with pytest.raises(RecordError) as caught:
        parse_record(row)
    assert caught.value.reason == reason
    assert "\n" not in str(caught.value)


def test_declared_format_is_not_guessed():
    both = {"messages": [USER, ANSWER], "conversations": [{"from": "human", "value": "h"}]}
    assert parse_record(both, "messages").messages[0].text == "q"
    assert parse_record(both, "sharegpt").messages[0].text == "h"
    with pytest.raises(ValueError, match="unknown format"):
        parse_record(both, "alpaca")
    with pytest.raises(RecordError, match="of which one would not be read"):
        parse_record(both)


def test_records_that_differ_in_a_weight_have_hashes_of_their_own():
    """The hash names what a sample is made of; it keys the cache of teacher targets."""
    user, answer = TURNS["messages"]
    rows = [{"messages": [user, answer | {"weight": weight}, user, answer]} for weight in (0, 0.25, 0.5, 1)]
    hashes = [hash_content(parse_record(row), []) for row in rows]
    assert len(set(hashes)) == 4
    assert hash_content(parse_record({"messages": [user, answer, user, answer]}), []) == hashes[-1]
