"""Answers given as token ids: trained on as they are, behind the prompt that asked for them."""

from __future__ import annotations

import numpy as np
import pytest

from pixelprune.records.chat import ChatEncoder
from pixelprune.records.prepare import hash_content
from pixelprune.records.reader import parse_record
from pixelprune.records.record import RecordError
from pixelprune.records.token_answers import is_open, with_end_alone
from tests.pixelprune.records.agent_templates import TEMPLATES
from training.composition.toy import build_tokenizer

QUESTION = {"role": "user", "content": "Where is <|Save?"}


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def answered(tokenizer, ids: list[int], *before: dict, **more) -> dict:
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return {"messages": [*before, QUESTION, {"role": "assistant", "content": text, "token_ids": ids, **more}]}


def encoded(tokenizer, row: dict, **settings):
    return ChatEncoder(tokenizer, **settings).encode(parse_record(row))


def letters(tokenizer, text: str) -> list[int]:
    """One token a letter: what no tokenizer makes of a text whose words it knows."""
    return [token for letter in text for token in tokenizer(letter, add_special_tokens=False)["input_ids"]]


def test_ids_are_trained_on_where_their_text_tokenises_to_others(tokenizer):
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    ids = [*letters(tokenizer, "Click the button"), end]
    assert len(ids) > len(tokenizer("Click the button")["input_ids"]) + 1
    chat = encoded(tokenizer, answered(tokenizer, ids))
    prompt = tokenizer("<|im_start|>user\nWhere is <|Save?<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
    assert chat.input_ids.tolist() == [*prompt, *ids]
    assert chat.input_ids[chat.supervised].tolist() == ids
    assert chat.weights is None


def test_an_answer_that_tokenises_back_is_what_its_text_is(tokenizer):
    """But for the line break behind the end token, which is not trained on."""
    ids = tokenizer("Open the menu.<|im_end|>", add_special_tokens=False)["input_ids"]
    by_text = encoded(tokenizer, {"messages": [QUESTION, {"role": "assistant", "content": "Open the menu."}]})
    by_ids = encoded(tokenizer, answered(tokenizer, ids))
    assert by_ids.input_ids.tolist() == by_text.input_ids[: len(by_ids.input_ids)].tolist()
    assert by_text.input_ids[by_text.supervised].tolist() == by_ids.input_ids[by_ids.supervised].tolist()


def test_an_answer_that_was_cut_has_no_end_token(tokenizer):
    ids = letters(tokenizer, "Click")
    chat = encoded(tokenizer, answered(tokenizer, ids))
    assert chat.input_ids[-len(ids) :].tolist() == ids


def test_an_answer_may_be_its_end_token_alone(tokenizer):
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    chat = encoded(tokenizer, answered(tokenizer, [end]))
    assert chat.input_ids[chat.supervised].tolist() == [end]


def test_marks_in_its_text_are_text(tokenizer):
    ids = letters(tokenizer, "<image> and <img>a.png</img>")
    record = parse_record(answered(tokenizer, ids))
    assert record.images == []
    assert encoded(tokenizer, answered(tokenizer, ids)).supervised.sum() == len(ids)


def test_weights_of_tokens_and_of_the_turn_multiply(tokenizer):
    ids = letters(tokenizer, "abc")
    chat = encoded(tokenizer, answered(tokenizer, ids, token_weights=[1, 0.5, 0.25], weight=2))
    assert chat.weights[chat.supervised].tolist() == [2.0, 1.0, 0.5]
    assert not chat.weights[~chat.supervised].any()


@pytest.mark.parametrize("thinking", [None, True, False])
def test_the_prompt_is_the_one_that_it_was_asked_with(tokenizer, thinking):
    template = TEMPLATES["qwen3_5 think"]
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    choice = {} if thinking is None else {"enable_thinking": thinking}
    asked = tokenizer.apply_chat_template([QUESTION], tokenize=False, add_generation_prompt=True, **choice)
    ids = letters(tokenizer, "abc")
    chat = encoded(tokenizer, answered(tokenizer, ids, **choice))
    assert chat.input_ids.tolist() == tokenizer(asked, add_special_tokens=False)["input_ids"] + ids


def test_earlier_answers_are_read_and_not_trained_on(tokenizer):
    ids = letters(tokenizer, "abc")
    before = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "loss": False}]
    chat = encoded(tokenizer, answered(tokenizer, ids, *before))
    assert chat.input_ids[chat.supervised].tolist() == ids
    before[1] = {"role": "assistant", "content": "b"}
    assert encoded(tokenizer, answered(tokenizer, ids, *before), last_turn_only=True).supervised.sum() == len(ids)
    with pytest.raises(RecordError, match="last_turn_only"):
        encoded(tokenizer, answered(tokenizer, ids, *before))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"content": "other"}, "are not the text 'other'"),
        ({"token_ids": [1, 2.5]}, "expected a list of whole numbers"),
        ({"token_ids": "12"}, "token_ids is str"),
        ({"token_ids": None, "token_weights": [1.0]}, "'token_weights' without token_ids"),
        ({"token_weights": [1.0]}, "1 token_weights for 3 token_ids"),
        ({"token_weights": [1.0, 0.0, 1.0]}, "token_weights hold 0.0"),
        ({"enable_thinking": "no"}, "expected true or false"),
        ({"content": [{"type": "text", "text": "abc"}]}, "content is list"),
        ({"reasoning_content": "so"}, "token_ids and 'reasoning_content'"),
        ({"token_ids": [70, 70, 10**6]}, "are not the text"),
        ({"loss": False}, "nothing to learn"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(tokenizer, changes, message):
    row = answered(tokenizer, letters(tokenizer, "abc"))
    row["messages"][-1] |= changes
    with pytest.raises(RecordError, match=message):
        encoded(tokenizer, row)


def test_the_hash_of_a_record_knows_its_ids(tokenizer):
    ids = letters(tokenizer, "Click")
    whole = tokenizer("Click", add_special_tokens=False)["input_ids"]
    rows = [answered(tokenizer, ids), answered(tokenizer, whole), answered(tokenizer, ids, enable_thinking=False),
            answered(tokenizer, ids, token_weights=[0.5] * len(ids))]  # fmt: skip
    hashes = [hash_content(parse_record(row), []) for row in rows]
    assert len(set(hashes)) == len(rows)
    assert np.all(np.array(hashes) >= 0)


def test_a_turn_before_the_last_cannot_have_them(tokenizer):
    ids = letters(tokenizer, "abc")
    row = answered(tokenizer, ids)
    row["messages"].append({"role": "user", "content": "And?"})
    with pytest.raises(RecordError, match="another turn than the last"):
        encoded(tokenizer, row)


def test_an_open_question_gets_an_end_token_to_be_replaced(tokenizer):
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    said = {"role": "assistant", "content": "There.", "loss": False}
    record = parse_record({"messages": [QUESTION, said, QUESTION]})
    assert is_open(record)
    chat = ChatEncoder(tokenizer).encode(with_end_alone(record, end))
    assert chat.supervised.tolist() == [False] * (len(chat.input_ids) - 1) + [True]
    assert chat.input_ids[-1] == end
    for messages in ([QUESTION, said], [QUESTION, {**said, "loss": True}, QUESTION]):
        assert not is_open(parse_record({"messages": messages})), "ends with an answer, or teaches an earlier one"
