"""An answer that a record gives as token ids, as `python -m training.answer` writes them.

    {"role": "assistant", "content": "(512, 87)", "token_ids": [7, 520, ...], "token_weights": [1.0, 0.8, ...],
     "enable_thinking": false}

What a model generated need not be what its text tokenises to, and whether it ended by itself or was cut does not show
in a text at all. So the ids are what is trained on, behind the prompt that the chat template gives for the turns before
(asked with `enable_thinking` where it is said); `content` must be their text, which notices another tokenizer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from pixelprune.records.agents import REASONING_KEYS
from pixelprune.records.keys import is_empty
from pixelprune.records.record import AnswerTokens, Message, Record, RecordError
from pixelprune.sample import ChatTokens

__all__ = [
    "MAX_WEIGHT",
    "MIN_WEIGHT",
    "TOKEN_KEYS",
    "answer_tokens_of",
    "is_open",
    "text_of_tokens",
    "with_answer_tokens",
    "with_end_alone",
]

TOKEN_KEYS = ("token_ids", "token_weights", "enable_thinking")
MIN_WEIGHT, MAX_WEIGHT = 1e-4, 1e4
"""Of a loss weight that is not 0."""


def answer_tokens_of(turn: Mapping[str, Any], content: Any) -> AnswerTokens | None:
    """The turn's `token_ids` with what belongs to them; None for a turn without. Raises RecordError (bad_token_ids)."""
    if is_empty(turn.get("token_ids")):
        lonely = next((key for key in TOKEN_KEYS if not is_empty(turn.get(key))), None)
        if lonely:
            raise RecordError("bad_token_ids", f"a turn has {lonely!r} without token_ids")
        return None
    others = [key for key in (*REASONING_KEYS, "tool_calls") if not is_empty(turn.get(key))]
    if not isinstance(content, str):
        raise RecordError("bad_token_ids", f"content is {type(content).__name__}, expected the text of the token_ids")
    if others:
        raise RecordError("bad_token_ids", f"a turn has token_ids and {others[0]!r}, which the ids would have to hold")
    ids, weights = _listed(turn, "token_ids"), _listed(turn, "token_weights")
    if not all(type(token) is int and 0 <= token < 2**31 for token in ids):
        raise RecordError("bad_token_ids", f"token_ids {ids!r:.60}: expected a list of whole numbers")
    if weights and len(weights) != len(ids):
        raise RecordError("bad_token_ids", f"{len(weights)} token_weights for {len(ids)} token_ids")
    for weight in weights:
        if type(weight) not in (int, float) or not MIN_WEIGHT <= weight < MAX_WEIGHT:
            raise RecordError(
                "bad_token_ids", f"token_weights hold {weight!r:.40}, expected numbers from {MIN_WEIGHT:g} to "
                f"{MAX_WEIGHT:g}"
            )  # fmt: skip
    thinking = turn.get("enable_thinking")
    if thinking is not None and type(thinking) is not bool:
        raise RecordError("bad_token_ids", f"enable_thinking is {thinking!r:.40}, expected true or false")
    return AnswerTokens(tuple(ids), tuple(map(float, weights)), thinking)


def with_answer_tokens(tokenizer: Any, prompt: str, answer: Message) -> ChatTokens:
    """The rendered prompt, tokenised, with the answer's ids behind it, which alone are supervised.

    Raises RecordError: bad_token_ids for ids that the tokenizer reads as another text than the turn's, and
    no_supervised_token for a turn that is not to be trained on.
    """
    assert answer.tokens is not None
    if not answer.supervised:
        raise RecordError("no_supervised_token", "no assistant turn to be trained on, so there is nothing to learn")
    ids = np.array(answer.tokens.ids, dtype=np.int64)
    if int(ids.max()) >= len(tokenizer) or text_of_tokens(tokenizer, answer.tokens.ids) != answer.text:
        raise RecordError(
            "bad_token_ids",
            f"the token_ids are not the text {answer.text!r:.60} to this tokenizer (model.path)",
        )
    head = np.array(tokenizer(prompt, add_special_tokens=False)["input_ids"], dtype=np.int64)
    weights = np.zeros(len(head) + len(ids), dtype=np.float32)
    weights[len(head) :] = answer.weight
    if answer.tokens.weights:
        weights[len(head) :] *= np.array(answer.tokens.weights, dtype=np.float32)
    supervised = np.arange(len(weights)) >= len(head)
    is_weighted = bool((weights[supervised] != 1).any())
    return ChatTokens(np.concatenate([head, ids]), supervised, weights if is_weighted else None)


def is_open(record: Record) -> bool:
    """Whether a record ends with a question, and no answer in it is to be trained on."""
    return record.messages[-1].role != "assistant" and not any(message.supervised for message in record.messages)


def with_end_alone(record: Record, end_token_id: int) -> Record:
    """An open record with the shortest answer there is, so that it has a place for the one that will be written."""
    answer = Message("assistant", (), tokens=AnswerTokens((end_token_id,)))
    return dataclasses.replace(record, messages=(*record.messages, answer))


def text_of_tokens(tokenizer: Any, ids: tuple[int, ...]) -> str:
    """The text of ids without special tokens, as generation gives it."""
    text: str = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


def _listed(turn: Mapping[str, Any], key: str) -> list[Any]:
    value = turn.get(key)
    if value is not None and not isinstance(value, list | tuple):
        raise RecordError("bad_token_ids", f"{key} is {type(value).__name__}, expected a list")
    return list(value or ())
