"""A record with a model's answer, as a row of JSON lines that the reader reads back to the same messages."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image

from pixelprune.records.image_part import SESSION_KEY
from pixelprune.records.record import AnswerTokens, ImageRef, Message, ObjectMark, Part, Record
from pixelprune.records.token_answers import MIN_WEIGHT


@dataclass(frozen=True)
class Answer:
    """One answer of the model.

    ids: with the end token where there is one; text: of them, without special tokens. log_probs: float32 (n,), of each
    id under the model, at temperature 1. hidden: (n, D), the final hidden states that predicted them.
    """

    ids: tuple[int, ...]
    text: str
    has_ended: bool
    log_probs: torch.Tensor
    hidden: torch.Tensor

    def tokens(self, *, enable_thinking: bool | None, by_confidence: bool) -> AnswerTokens:
        """As a record holds it. by_confidence: every token weighs what the model gave it, its probability."""
        weights: tuple[float, ...] = ()
        if by_confidence:
            weights = tuple(round(weight, 6) for weight in self.log_probs.exp().clamp(min=MIN_WEIGHT).tolist())
        return AnswerTokens(self.ids, weights, enable_thinking)


def answered(question: Sequence[Message], answer: Answer, tokens: AnswerTokens) -> tuple[Message, ...]:
    """The turns with the answer behind them; answers before it are read and not trained on."""
    before = (replace(message, weight=0.0) if message.role == "assistant" else message for message in question)
    return (*before, Message("assistant", (answer.text,) if answer.text else (), tokens=tokens))


def row_of(record: Record, **facts: Any) -> dict[str, Any]:
    """The record as JSON values; facts are added to its metadata. Pictures without a file go along as base64."""
    row: dict[str, Any] = {"messages": [_turn(message) for message in record.messages]}
    if record.tools:
        row["tools"] = list(record.tools)
    if record.weight != 1:
        row["weight"] = record.weight
    if metadata := {**record.metadata, **facts}:
        row["metadata"] = metadata
    return row


def _turn(message: Message) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": message.role}
    if message.tokens is not None:
        turn["content"] = message.text
        turn["token_ids"] = list(message.tokens.ids)
        if message.tokens.weights:
            turn["token_weights"] = list(message.tokens.weights)
        if message.tokens.enable_thinking is not None:
            turn["enable_thinking"] = message.tokens.enable_thinking
    else:
        # Typed parts: in a plain string <image> would be a mark.
        turn["content"] = [_part(part) for part in message.parts]
        turn |= message.template_fields
    if message.role == "assistant" and message.weight != 1:
        turn["weight"] = message.weight
    return turn


def _part(part: Part) -> dict[str, Any]:
    assert not isinstance(part, ObjectMark), "written before"
    if not isinstance(part, ImageRef):
        return {"type": "text", "text": part}
    stated = {**part.wish.stated, **({SESSION_KEY: True} if part.starts_session else {})}
    if isinstance(part.source, str):
        return {"type": "image", "image": part.source, **stated}
    return {"type": "image", "base64": base64.b64encode(_encoded(part.source)).decode(), **stated}


def _encoded(picture: bytes | Image.Image) -> bytes:
    if isinstance(picture, bytes):
        return picture
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()
