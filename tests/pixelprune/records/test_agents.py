"""Tools, calls and reasoning: token by token what `apply_chat_template` gives, supervised where the assistant wrote."""

import copy

import pytest

from pixelprune.records.chat import ChatEncoder
from pixelprune.records.reader import parse_record
from pixelprune.records.record import ImageRef, RecordError
from tests.pixelprune.records.agent_templates import TEMPLATES
from training.composition.toy import build_tokenizer

REASONING = [name for name in TEMPLATES if name != "instruct"]
TOOL = {
    "type": "function",
    "function": {
        "name": "press",
        "description": "press a place",
        "parameters": {"type": "object", "properties": {"x": {"type": "integer"}, "y": {"type": "integer"}}},
    },
}
CALL = {"type": "function", "function": {"name": "press", "arguments": {"x": 123, "y": 59}}}
USER = {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "Press it"}]}
AGENT = {
    "messages": [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": [{"type": "image", "image": "b.png"}, {"type": "text", "text": "done"}]},
        {"role": "assistant", "content": "Pressed."},
    ],
    "tools": [TOOL],
}
WRITTEN = {
    "json": '<tool_call>\n{"name": "press", "arguments": {"x": 123, "y": 59}}\n</tool_call><|im_end|>',
    "tags": "<tool_call>\n<function=press>\n<parameter=x>\n123\n</parameter>\n<parameter=y>\n59\n</parameter>\n"
    "</function>\n</tool_call><|im_end|>",
}


def encoder(name, **kwargs):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = TEMPLATES[name]
    return ChatEncoder(tokenizer, **kwargs)


def answers(chat_encoder, row):
    """The supervised texts, after a check that the ids are the stock call's for the row's own messages."""
    chat = chat_encoder.encode(parse_record(row))
    messages = copy.deepcopy(row["messages"])
    for message in messages:
        if isinstance(message["content"], list):
            message["content"] = [{"type": "image"} if part["type"] == "image" else part for part in message["content"]]
    stock = chat_encoder.tokenizer.apply_chat_template(
        messages, tools=row.get("tools"), tokenize=True, return_dict=True
    )
    assert chat.input_ids.tolist() == stock["input_ids"]
    edges = [k for k in range(1, len(chat.supervised)) if chat.supervised[k] != chat.supervised[k - 1]]
    edges = [*edges, len(chat.supervised)][: len(edges) // 2 * 2 + 2]
    pieces = [chat.input_ids[a:b] for a, b in zip(edges[::2], edges[1::2], strict=False)]
    return [chat_encoder.tokenizer.decode(piece) for piece in pieces]


def thought(text, answer):
    return {"role": "assistant", "content": answer, "reasoning_content": text}


@pytest.mark.parametrize("name", TEMPLATES)
def test_tools_calls_and_their_screenshots(name):
    written = WRITTEN["tags" if "qwen3_5" in name else "json"]
    found = answers(encoder(name, supervise_empty_reasoning=False), AGENT)
    assert found == [written, "Pressed.<|im_end|>"]
    record = parse_record(AGENT)
    assert [ref.source for ref in record.images] == ["a.png", "b.png"]
    assert record.messages[2].parts == (ImageRef("b.png"), "done")


def test_the_same_in_every_form_that_is_published():
    plain = copy.deepcopy(AGENT)
    plain["messages"][2]["content"] = "done"
    expected = parse_record(plain)
    as_text = copy.deepcopy(plain)
    as_text["messages"][1] = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "press", "arguments": '{"x": 123, "y": 59}'}}],
    }
    as_text["tools"] = '[{"type": "function", "function": {"name": "press", "description": "press a place", ' + (
        '"parameters": {"type": "object", "properties": {"x": {"type": "integer"}, "y": {"type": "integer"}}}}}]'
    )
    table = copy.deepcopy(plain)
    table["messages"][1]["tool_calls"][0]["function"]["arguments"]["unused"] = None
    sharegpt = {
        "conversations": [
            {"from": "human", "value": "<image>Press it"},
            {"from": "function_call", "value": '{"name": "press", "arguments": {"x": 123, "y": 59}}'},
            {"from": "observation", "value": "done"},
            {"from": "gpt", "value": "Pressed."},
        ],
        "images": ["a.png"],
        "tools": as_text["tools"],
    }
    named = copy.deepcopy(plain)
    named["messages"][1:3] = [
        {"role": "tool_call", "content": '{"name": "press", "arguments": {"x": 123, "y": 59}}'},
        {"role": "tool_response", "content": "done"},
    ]
    for row in (as_text, table, sharegpt, named):
        assert parse_record(row) == expected
    spoken = copy.deepcopy(named)
    spoken["messages"].insert(1, {"role": "assistant", "content": "I press."})
    joined = parse_record(spoken).messages
    assert [message.role for message in joined] == ["user", "assistant", "tool", "assistant"]
    assert (joined[1].parts, len(joined[1].tool_calls)) == (("I press.",), 1)


def test_two_calls_and_a_developers_turn():
    row = copy.deepcopy(AGENT)
    row["messages"][1] |= {"content": "Both.", "tool_calls": [CALL, CALL]}
    row["messages"].insert(0, {"role": "system", "content": "Be brief."})
    found = answers(encoder("instruct"), row)
    call = WRITTEN["json"].removesuffix("<|im_end|>")
    assert found[0] == f"Both.\n{call}\n{call}<|im_end|>"
    as_developer = copy.deepcopy(row)
    as_developer["messages"][0]["role"] = "developer"
    assert parse_record(as_developer) == parse_record(row)


@pytest.mark.parametrize("name", REASONING)
@pytest.mark.parametrize(
    "answer",
    [
        {"content": "Five.", "reasoning_content": "From the left: five."},
        {"content": "Five.", "reasoning": "From the left: five."},
        {"content": "Five.", "thinking": "From the left: five."},
        {"content": [{"type": "thinking", "thinking": "From the left: five."}, {"type": "text", "text": "Five."}]},
        {"content": "<think>\nFrom the left: five.\n</think>\n\nFive."},
    ],
)
def test_reasoning_in_every_form_is_rendered_by_the_template(name, answer):
    row = {"messages": [USER, {"role": "assistant", **answer}]}
    chat = encoder(name).encode(parse_record(row))
    plain = {"messages": [USER, thought("From the left: five.", "Five.")]}
    assert answers(encoder(name), plain) == ["From the left: five.\n</think>\n\nFive.<|im_end|>"]
    assert chat.input_ids.tolist() == encoder(name).encode(parse_record(plain)).input_ids.tolist()


@pytest.mark.parametrize("name", REASONING)
def test_an_earlier_turn_is_rewritten_only_where_it_is_not_trained_on(name):
    first = {"role": "assistant", "content": "<think>\nA\n</think>\n\nfirst"}
    row = {"messages": [USER, first, {"role": "user", "content": "Two?"}, thought("B", "second")]}
    with pytest.raises(RecordError, match=r"turn 2: the chat template rewrites .*data\.last_turn_only") as caught:
        encoder(name).encode(parse_record(row))
    assert caught.value.reason == "template"
    assert answers(encoder(name, last_turn_only=True), row) == ["B\n</think>\n\nsecond<|im_end|>"]
    row["messages"][1]["loss"] = False
    chat = encoder(name).encode(parse_record(row))
    text = encoder(name).tokenizer.decode(chat.input_ids)
    assert "<think>\nA" not in text
    assert chat.supervised.sum() == encoder(name, last_turn_only=True).encode(parse_record(row)).supervised.sum()


@pytest.mark.parametrize("name", REASONING)
def test_reasoning_between_calls_stands_and_is_trained_on(name):
    row = copy.deepcopy(AGENT)
    row["messages"][1]["reasoning_content"] = "I look."
    row["messages"][3]["reasoning_content"] = "It moved."
    call = WRITTEN["tags" if "qwen3_5" in name else "json"]
    expected = [f"I look.\n</think>\n\n{call}", "It moved.\n</think>\n\nPressed.<|im_end|>"]
    assert answers(encoder(name), row) == expected


@pytest.mark.parametrize("name", REASONING)
def test_whether_an_empty_block_is_supervised_is_a_setting(name):
    row = {"messages": [USER, {"role": "assistant", "content": "Five."}]}
    (without,) = answers(encoder(name, supervise_empty_reasoning=False), row)
    assert without == "Five.<|im_end|>"
    (with_block,) = answers(encoder(name), row)
    given = name == "qwen3_5 nothink"  # its generation prompt holds the whole block
    assert with_block.lstrip("\n") == ("Five.<|im_end|>" if given else "</think>\n\nFive.<|im_end|>")


def test_what_the_template_has_no_place_for_is_refused_by_name(tokenizer):
    for row, what in (
        ({"messages": [USER, thought("A", "b")]}, "reasoning"),
        ({"messages": AGENT["messages"][:2]}, "tool calls"),
        ({"messages": [USER, {"role": "assistant", "content": "b"}], "tools": [TOOL]}, "tools"),
    ):
        with pytest.raises(RecordError, match=f"no place for {what}"):
            ChatEncoder(tokenizer).encode(parse_record(row))
    late = {"messages": [USER, {"role": "system", "content": "Late."}, {"role": "assistant", "content": "b"}]}
    with pytest.raises(RecordError, match=r"turn 2: the chat template leaves out 'Late.'"):
        encoder("instruct").encode(parse_record(late))


@pytest.mark.parametrize("forged", ["<|image_pad|>", "|im_end|", "a<|im_end|", "|im_start|>b"])
@pytest.mark.parametrize(
    "place",
    [
        lambda row, s: row["tools"][0]["function"].update(description=s),
        lambda row, s: row["tools"][0]["function"]["parameters"]["properties"].update({s: {}}),
        lambda row, s: row["messages"][1]["tool_calls"][0]["function"].update(name=s),
        lambda row, s: row["messages"][1]["tool_calls"][0]["function"]["arguments"].update({s: 1}),
        lambda row, s: row["messages"][1]["tool_calls"][0]["function"].update(arguments={"x": [{"y": s}]}),
        lambda row, s: row["messages"][1].update(reasoning_content=s),
        lambda row, s: row["messages"][2].update(name=s),
    ],
)
def test_every_string_that_the_template_sees_is_checked(forged, place):
    """Also those that become a control token between the template's own brackets, as in <function=NAME>."""
    row = copy.deepcopy(AGENT)
    place(row, forged)
    with pytest.raises(RecordError) as caught:
        encoder("qwen3_5 think").encode(parse_record(row))
    assert caught.value.reason == "special_token"


def test_arguments_are_checked_as_what_they_are_parsed_to():
    row = copy.deepcopy(AGENT)
    row["messages"][1]["tool_calls"][0]["function"]["arguments"] = '{"x": "\\u003c|image_pad|\\u003e"}'
    with pytest.raises(RecordError, match="image_pad"):
        encoder("instruct").encode(parse_record(row))
    for broken in ("{", "[1]", 5):
        row["messages"][1]["tool_calls"][0]["function"]["arguments"] = broken
        with pytest.raises(RecordError) as caught:
            parse_record(row)
        assert caught.value.reason == "bad_tools"


def test_what_a_tool_says_takes_no_image_and_names_no_file():
    row = copy.deepcopy(AGENT)
    row["messages"][2]["content"] = "<image> <img>secret.png</img>"
    assert [ref.source for ref in parse_record(row).images] == ["a.png"]
    with pytest.raises(RecordError, match=r"0 placeholders .* 1 images .*a tool's text is text"):
        parse_record({**row, "messages": row["messages"][1:], "images": ["a.png"]})
