"""Questions and answers under keys of their own, and parts in others' form, give the record of the same turns."""

import base64
import json

import pytest

from pixelprune.records.keys import KeyRules
from pixelprune.records.reader import parse_record
from pixelprune.records.record import ImageRef, RecordError
from training.data.columns import READ_KEYS


def turns(*texts, **more):
    roles = ("user", "assistant") * (len(texts) // 2)
    return {"messages": [{"role": r, "content": t} for r, t in zip(roles, texts, strict=True)], **more}


IMAGE = {"images": ["a.png"]}
PARTS = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "x"}]
SAME = [
    ({"prompt": "<image>x", "completion": "ok", **IMAGE}, turns("<image>x", "ok", **IMAGE)),
    (
        {"prompt": [{"role": "user", "content": PARTS}], "completion": [{"role": "assistant", "content": "ok"}]},
        turns(PARTS, "ok"),
    ),
    ({"query": "<image>x", "response": "ok", **IMAGE}, turns("<image>x", "ok", **IMAGE)),
    (
        {"query": "x", "response": "ok", "history": [["<image>a", "b"]], "system": "s", **IMAGE},
        turns("<image>a", "b", "x", "ok", system="s", **IMAGE),
    ),
    ({"instruction": "<image>x", "input": "", "output": "ok", **IMAGE}, turns("<image>x", "ok", **IMAGE)),
    ({"instruction": "x", "input": "y", "output": "ok", "history": []}, turns("x\ny", "ok")),
]


@pytest.mark.parametrize(("row", "same"), SAME)
def test_every_shape_is_read_as_its_turns(row, same):
    assert parse_record(row) == parse_record(same)
    assert set(row) <= set(READ_KEYS), "or a table's columns would be refused"


def test_answers_within_a_prompt_are_not_trained_on():
    row = turns("a", "b", "c", "d")["messages"]
    record = parse_record({"prompt": row[:3], "completion": row[3:]})
    assert [message.supervised for message in record.messages] == [False, False, False, True]


NUMBER = {"query": "a", "response": "b", "history": 5}


def test_keys_beside_turns_and_wrong_forms_are_refused():
    with pytest.raises(RecordError, match="'prompt'"):
        parse_record(turns("a", "b", prompt="c", completion="d"))
    with pytest.raises(RecordError, match="'mood'"):
        parse_record({"query": "a", "response": "b", "mood": "c"})
    for row in ({"query": 3, "response": "b"}, {"query": "a", "response": "b", "history": [["c"]]}, NUMBER):
        with pytest.raises(RecordError) as caught:
            parse_record(row)
        assert caught.value.reason == "bad_content"
    nested: dict = {}
    for _ in range(2000):
        nested = {"a": nested}
    with pytest.raises(RecordError, match="RecursionError"):  # by who reads a record and does not prepare it, too
        parse_record(turns("a", "b", tools=[{"name": "f", "parameters": nested}]))
    kept = parse_record(turns("a", "b", prompt="c"), rules=KeyRules.ignoring(["prompt"]))
    assert kept == parse_record(turns("a", "b"))


def test_images_that_nothing_marks_come_before_the_first_question():
    record = parse_record(turns("x", "ok", "y", "z", images=["a.png", "b.png"]))
    assert record.messages[0].parts == (ImageRef("a.png"), ImageRef("b.png"), "x")
    assert record.messages[2].parts == ("y",)
    with_system = turns("x", "ok", images=["a.png"])
    with_system["messages"].insert(0, {"role": "system", "content": "s"})
    assert [len(message.parts) for message in parse_record(with_system).messages] == [1, 2, 1]
    asked = {"prompt": [{"role": "user", "content": "x"}], "completion": [{"role": "assistant", "content": "ok"}]}
    assert parse_record(asked | IMAGE) == parse_record(turns(PARTS, "ok"))


@pytest.mark.parametrize(
    "row",
    [
        turns("x", "ok", "<image>y", "z", images=["a.png", "b.png"]),
        turns([{"type": "text", "text": "x"}], "ok", **IMAGE),
        {"messages": [{"role": "assistant", "content": "ok"}], **IMAGE},
        {"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "ok"}], **IMAGE},
    ],
)
def test_images_of_which_some_are_marked_or_where_marks_are_parts_are_counted(row):
    with pytest.raises(RecordError) as caught:
        parse_record(row)
    assert caught.value.reason == "image_count"


def test_parts_with_value_are_the_parts_of_others():
    call = '{"name": "click", "arguments": {"x": 1}}'
    row = turns(
        [{"type": "image_url", "value": "a.png"}, {"type": "text", "value": "x"}],
        [{"type": "reasoning", "value": "why"}, {"type": "text", "value": "ok"}, {"type": "tool_call", "value": call}],
    )
    same = turns(PARTS, "ok")
    same["messages"][1] |= {"reasoning": "why", "tool_calls": [{"name": "click", "arguments": {"x": 1}}]}
    assert parse_record(row) == parse_record(same)
    for part in (
        {"type": "text", "text": "x", "value": "y"},
        {"type": "video_url", "value": "a.mp4"},
        {"type": "image", "value": "a.png"},
    ):
        with pytest.raises(RecordError) as caught:
            parse_record(turns([part], "ok"))
        assert caught.value.reason in ("unread_key", "bad_content")


def test_turns_may_be_json_text_as_tables_have_them():
    row = turns("<image>x", "ok", **IMAGE)
    assert parse_record({**row, "messages": json.dumps(row["messages"])}) == parse_record(row)
    uground = [{"from": "human", "value": "<image>\nWhere?"}, {"from": "gpt", "value": "(3, 4)"}]
    record = parse_record({"conversations": json.dumps(uground), "image": b"png", "width": 4, "height": 3})
    assert record == parse_record({"conversations": uground, "image": b"png", "width": 4, "height": 3})
    for text in ("[", "words", '{"role": "user"}', "[" * 100_000):
        with pytest.raises(RecordError) as caught:
            parse_record({"messages": text})
        assert caught.value.reason == "bad_content"


def test_a_source_part_holds_its_image():
    data = base64.b64encode(b"png").decode()

    def record(source):
        return parse_record(turns([{"type": "image", "source": source}, {"type": "text", "text": "x"}], "ok"))

    assert record({"type": "base64", "media_type": "image/png", "data": data}).images == [ImageRef(b"png")]
    wrong = {
        "remote_image": {"type": "url", "url": "https://example.org/a.png"},
        "unread_key": {"type": "base64", "data": data, "max_pixels": 9},
    }
    for reason, source in wrong.items():
        with pytest.raises(RecordError) as caught:
            record(source)
        assert caught.value.reason == reason
    for source in ("a.png", {"type": "file", "data": data}, {"type": "base64", "data": "!"}, {"type": "base64"}):
        with pytest.raises(RecordError) as caught:
            record(source)
        assert caught.value.reason == "bad_image"
