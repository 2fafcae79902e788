"""Questions and answers under keys of their own give the record that the same turns give."""

import pytest

from pixelprune.records.keys import KeyRules
from pixelprune.records.reader import parse_record
from pixelprune.records.record import RecordError
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
