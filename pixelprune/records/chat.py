"""A conversation through the model's own chat template: token ids, and exactly the assistant turns supervised.

Which characters the assistant wrote is read off the template's structure, never searched for in the text or the ids:
by the template's `{% generation %}` marks where it has them, otherwise by rendering the conversation up to each
assistant turn. The whole text is tokenised once, and characters become tokens through the tokenizer's offsets.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils.chat_template_utils import render_jinja_template

from pixelprune.model_folder import ModelFolder
from pixelprune.records.record import Message, Record, RecordError
from pixelprune.sample import ChatTokens

__all__ = ["GENERATION_TAG", "SENTINELS", "ChatEncoder"]

Span = tuple[int, int]
"""Characters [start, end) of the rendered conversation."""

GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
SENTINELS = ("q", "z")
"""Answers put in place of the real one to see where the template writes an answer; nothing in common at either end."""


class ChatEncoder:
    """Records -> `ChatTokens`, for one tokenizer and its chat template."""

    def __init__(self, tokenizer: Any, *, last_turn_only: bool = False):
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError("expected a fast tokenizer (with character offsets), got a slow one (model.path)")
        if not isinstance(tokenizer.chat_template, str):
            raise ValueError("the tokenizer has no chat template (chat_template.jinja in model.path)")
        self.tokenizer = tokenizer
        self.last_turn_only = last_turn_only
        self._has_marks = bool(GENERATION_TAG.search(tokenizer.chat_template))
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        self._special = tuple(sorted(special | set(tokenizer.all_special_tokens), key=len, reverse=True))
        self._forged = re.compile("|".join(map(re.escape, self._special)) or r"(?!)")

    @classmethod
    def from_folder(
        cls, folder: str | Path, *, last_turn_only: bool = False, trust_remote_code: bool = False
    ) -> ChatEncoder:
        """Of a model folder or hub id."""
        opened = ModelFolder.open(folder, trust_remote_code=trust_remote_code)
        return cls(opened.tokenizer, last_turn_only=last_turn_only)

    def encode(self, record: Record) -> ChatTokens:
        """Token ids with one placeholder per image, and which of them are supervised.

        A token is supervised when it lies wholly inside what the assistant wrote, end token included: a token that
        began in the turn's header would be given, not predicted, when generating.
        Raises RecordError with reason special_token, bad_text, template or no_supervised_token.
        """
        self._check_text(record)
        text, spans = self.render(record)
        # The template's own special tokens are in the text already: nothing is to be added.
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        starts, ends = np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2).T
        weights = np.zeros(len(starts), dtype=np.float32)
        for (start, end), weight in self._supervised(spans, record):
            weights[(starts >= start) & (ends <= end) & (ends > starts)] = weight
        supervised = weights > 0
        if not supervised.any():
            raise RecordError("no_supervised_token", "no assistant turn to be trained on, so there is nothing to learn")
        return ChatTokens(
            np.array(encoded["input_ids"], dtype=np.int64),
            supervised,
            weights if (weights[supervised] != 1).any() else None,
        )

    def _supervised(self, spans: list[Span], record: Record) -> list[tuple[Span, float]]:
        """The answers to be trained on, out of all of them, with the weight of each."""
        weights = [message.weight for message in record.messages if message.role == "assistant"]
        first = -1 if self.last_turn_only else 0
        if all(weight == 1 for weight in weights):
            return [(span, 1.0) for span in spans[first:]]
        if len(weights) != len(spans):
            raise RecordError(
                "template",
                f"the chat template marks {len(spans)} answers in a conversation of {len(weights)}, so which of them "
                "is not to be trained on cannot be told",
            )
        return [(span, weight) for span, weight in list(zip(spans, weights, strict=True))[first:] if weight]

    def render(self, record: Record) -> tuple[str, list[Span]]:
        """The conversation as text, and the characters of every assistant turn in it."""
        turns = [_template_turn(message) for message in record.messages]
        if self._has_marks:
            texts, marks = self._apply(turns, return_assistant_tokens_mask=True)
            return texts[0], [(int(start), int(end)) for start, end in marks[0]]
        text = self._text(turns)
        spans = [self._span(turns, i, text) for i, turn in enumerate(turns) if turn["role"] == "assistant"]
        return text, spans

    def _span(self, turns: list[dict[str, Any]], i: int, text: str) -> Span:
        """Where assistant turn i stands: from the end of its header to its end token."""
        if i == 0:  # many templates cannot render an empty conversation
            return self._span_by_substitution(turns, i, text)
        header = self._text(turns[:i], add_generation_prompt=True)
        upto = text if i == len(turns) - 1 else self._text(turns[: i + 1])
        if upto.startswith(header) and text.startswith(upto):
            return len(header), self._end(text, len(header), len(upto))
        return self._span_by_substitution(turns, i, text)

    def _span_by_substitution(self, turns: list[dict[str, Any]], i: int, text: str) -> Span:
        """For templates that write a turn differently once it is history (as reasoning models do).

        Two other answers in this turn's place share with each other everything but the answer.
        """
        one, other = (self._text([*turns[:i], {"role": "assistant", "content": s}, *turns[i + 1 :]]) for s in SENTINELS)
        start = next((k for k, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(one))
        tail = one[start + 1 :]
        end = len(text) - len(tail)
        answer = turns[i]["content"]
        if one[:start] != text[:start] or not text.endswith(tail) or text[start:end].strip() != answer.strip():
            raise RecordError(
                "template",
                f"turn {i + 1}: the chat template rewrites this answer, so what the assistant wrote cannot be told "
                "apart; mark it in the template with {% generation %} ... {% endgeneration %}",
            )
        rest = self._forged.match(text, end)
        return start, rest.end() if rest else end

    def _end(self, text: str, start: int, end: int) -> int:
        """Leave out the white space that templates put after the end token: generation stops before it."""
        stripped = start + len(text[start:end].rstrip())
        return stripped if text[start:stripped].endswith(self._special) else end

    def _check_text(self, record: Record) -> None:
        for message in record.messages:
            forged = self._forged.search(message.text)
            if forged:
                raise RecordError(
                    "special_token",
                    f"a {message.role} turn contains {forged.group()!r}, which would become a control token",
                )
            try:
                message.text.encode()
            except UnicodeEncodeError as error:
                raise RecordError("bad_text", f"a {message.role} turn is not valid Unicode: {error}") from error

    def _text(self, turns: list[dict[str, Any]], **kwargs: Any) -> str:
        return self._apply(turns, **kwargs)[0][0]

    def _apply(self, turns: list[dict[str, Any]], **kwargs: Any) -> tuple[list[str], list[Any]]:
        from jinja2 import TemplateError

        try:
            texts, marks = render_jinja_template(
                conversations=[turns],
                chat_template=self.tokenizer.chat_template,
                **self.tokenizer.special_tokens_map,
                **kwargs,
            )
            return texts, marks
        except TemplateError as error:
            # Templates refuse conversations by raising: a system turn in the middle, two user turns in a row, ...
            raise RecordError("template", f"the chat template refuses this conversation: {error}") from error


def _template_turn(message: Message) -> dict[str, Any]:
    """A message as templates expect it: plain text as a string, otherwise typed parts."""
    if all(isinstance(part, str) for part in message.parts):
        return {"role": message.role, "content": message.text}
    parts = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image"} for p in message.parts]
    return {"role": message.role, "content": parts}
