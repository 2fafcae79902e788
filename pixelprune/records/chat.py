"""A conversation through the model's own chat template: token ids, and exactly the assistant turns supervised.

Which characters the assistant wrote is read off the template's structure, never searched for in the text or the ids:
by the template's `{% generation %}` marks where it has them, otherwise by asking it (`AnswerPlaces`). Tools, calls and
reasoning go through the template's own arguments. The whole text is tokenised once, and characters become tokens
through the tokenizer's offsets.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pixelprune.answers import GROUNDING_TOKENS
from pixelprune.model_folder import ModelFolder
from pixelprune.records.agents import split_reasoning, strings_in
from pixelprune.records.record import Message, Record, RecordError
from pixelprune.records.template import AnswerPlaces, Span, TemplateFacts, any_of, rewritten
from pixelprune.records.token_answers import with_answer_tokens
from pixelprune.sample import ChatTokens
from pixelprune.text.rendering import Rendering, Tokenising
from pixelprune.text.steps import Steps, all_at_once

__all__ = ["GENERATION_TAG", "ChatEncoder", "control_tokens", "would_forge"]

GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")


def control_tokens(tokenizer: Any, *, grounding_tokens: bool = False) -> tuple[str, ...]:
    """The tokens that no text of a conversation may hold: they would forge a turn, or an image. Longest first.

    grounding_tokens: texts may hold GROUNDING_TOKENS, which are then those tokens. Raises ValueError where the
    tokenizer has none of its own for things and boxes.
    """
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    special |= set(tokenizer.all_special_tokens)
    if grounding_tokens:
        missing = [token for token in GROUNDING_TOKENS[:4] if token not in special]
        if missing:
            raise ValueError(f"the tokenizer has no special token {missing[0]} (data.grounding_tokens)")
        special -= set(GROUNDING_TOKENS)
    return tuple(sorted(special, key=len, reverse=True))


def would_forge(token: str) -> str:
    """Why a text with this token is refused, and the way out where there is one."""
    advice = "; data.grounding_tokens=true takes it for what it is" if token in GROUNDING_TOKENS else ""
    return f"{token!r}, which would become a control token{advice}"


class ChatEncoder:
    """Records -> `ChatTokens`, for one tokenizer and its chat template."""

    def __init__(
        self,
        tokenizer: Any,
        *,
        last_turn_only: bool = False,
        supervise_empty_reasoning: bool = True,
        grounding_tokens: bool = False,
    ):
        """grounding_tokens: texts may hold `pixelprune.answers.GROUNDING_TOKENS`, which are then those tokens."""
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError("expected a fast tokenizer (with character offsets), got a slow one (model.path)")
        if not isinstance(tokenizer.chat_template, str):
            raise ValueError("the tokenizer has no chat template (chat_template.jinja in model.path)")
        self.tokenizer = tokenizer
        self.last_turn_only = last_turn_only
        self._rendering, self._tokenise = Rendering(tokenizer), Tokenising(tokenizer)
        self.template = TemplateFacts(self._text)
        self._has_marks = bool(GENERATION_TAG.search(tokenizer.chat_template))
        self._special = control_tokens(tokenizer, grounding_tokens=grounding_tokens)
        self._forged = any_of(self._special)
        self.places = AnswerPlaces(self._text, self.template, self._special, supervise_empty_reasoning)

    @classmethod
    def from_folder(
        cls, folder: str | Path, *, last_turn_only: bool = False, trust_remote_code: bool = False
    ) -> ChatEncoder:
        """Of a model folder or hub id."""
        opened = ModelFolder.open(folder, trust_remote_code=trust_remote_code)
        return cls(opened.tokenizer, last_turn_only=last_turn_only)

    def steps(self, record: Record) -> Steps[ChatTokens]:
        """Token ids with one placeholder per image, and which of them are supervised.

        A token is supervised when it lies wholly inside what the assistant wrote, end token included: a token that
        began in the turn's header would be given, not predicted, when generating.
        Pauses before the template and before the tokenizer.
        Raises RecordError with reason special_token, bad_text, template, bad_token_ids or no_supervised_token.
        """
        self._check_text(record)
        yield
        if any(message.tokens for message in record.messages):
            return self._encode_tokens(record)
        text, spans = self.render(record)
        yield
        # The template's own special tokens are in the text already: nothing is to be added.
        input_ids, characters = self._tokenise(text)
        starts, ends = characters.T
        weights = np.zeros(len(starts), dtype=np.float32)
        for (start, end), weight in self._supervised(spans, record):
            weights[(starts >= start) & (ends <= end) & (ends > starts)] = weight
        supervised = weights > 0
        if not supervised.any():
            raise RecordError("no_supervised_token", "no assistant turn to be trained on, so there is nothing to learn")
        return ChatTokens(
            input_ids,
            supervised,
            weights if (weights[supervised] != 1).any() else None,
        )

    encode = all_at_once(steps)

    def _encode_tokens(self, record: Record) -> ChatTokens:
        """A conversation whose last answer is token ids: the rendered prompt, and behind it the ids as they are."""
        *before, answer = (self._with_reasoning_apart(message) for message in record.messages)
        if answer.tokens is None or any(message.tokens for message in before):
            raise RecordError("bad_token_ids", "token_ids stand in another turn than the last")
        if not self.last_turn_only and any(message.supervised for message in before):
            raise RecordError(
                "bad_token_ids",
                "an answer with token_ids is trained on alone: mark the answers before it as not to be trained on "
                '("loss": false), or set data.last_turn_only',
            )
        self._refuse_what_has_no_place(before, record)
        thinking = answer.tokens.enable_thinking
        choice = {} if thinking is None else {"enable_thinking": thinking}
        turns = [_template_turn(message) for message in before]
        prompt = self._text(turns, tools=list(record.tools) or None, add_generation_prompt=True, **choice)
        _refuse_lost_text(before, prompt)
        return with_answer_tokens(self.tokenizer, prompt, answer)

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
        """The conversation as text, and the characters of every assistant turn in it; (0, 0) for one not trained on.

        Raises RecordError (template) for a template that has no place for what the record says, refuses it, or
        rewrites an answer that is to be trained on.
        """
        messages = [self._with_reasoning_apart(message) for message in record.messages]
        self._refuse_what_has_no_place(messages, record)
        turns = [_template_turn(message) for message in messages]
        tools = list(record.tools) or None
        answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
        trained = [i for i in (answers[-1:] if self.last_turn_only else answers) if messages[i].supervised]
        if self._has_marks:
            text, marks = self._asked(
                self._rendering.text_and_marks, turns, tools=tools, return_assistant_tokens_mask=True
            )
            spans = [(int(start), int(end)) for start, end in marks]
            named = dict(zip(answers, spans, strict=True)) if len(spans) == len(answers) else {}
        else:
            text = self._text(turns, tools=tools)
            named = self.places.find(turns, text, messages, trained, tools)
            spans = [named.get(i, (0, 0)) for i in answers]
        _refuse_lost_text(messages, text)
        for i in trained:
            if i in named and not _holds(text[slice(*named[i])], messages[i]):
                raise rewritten(i)
        return text, spans

    def _with_reasoning_apart(self, message: Message) -> Message:
        """An answer that begins with <think>...</think> in its text, as the template itself would read it."""
        if message.role != "assistant" or message.reasoning or "</think>" not in message.text:
            return message
        reasoning, answer = split_reasoning(message.text) if self.template.has_reasoning else ("", "")
        return replace(message, parts=(answer,) if answer else (), reasoning=reasoning) if reasoning else message

    def _refuse_what_has_no_place(self, messages: list[Message], record: Record) -> None:
        """A template drops what it does not know without a word."""
        for what, is_said, has_place in (
            ("tools", bool(record.tools), "has_tools"),
            ("tool calls", any(message.tool_calls for message in messages), "has_calls"),
            ("a tool's turns", any(message.role == "tool" for message in messages), "has_answers"),
            ("reasoning", any(message.reasoning for message in messages), "has_reasoning"),
        ):
            if is_said and not getattr(self.template, has_place):
                raise RecordError("template", f"the chat template has no place for {what} (model.path)")

    def _check_text(self, record: Record) -> None:
        """No string that the template sees may hold a control token, nor become one beside its <, > or |."""
        for message in record.messages:
            if message.tokens is not None:
                continue  # its text is not what is trained on
            self._check_strings([message.text], f"a {message.role} turn")
            self._check_strings(strings_in(message.template_fields), f"a {message.role} turn", is_structured=True)
            if "</think>" in message.reasoning or "<think>" in message.reasoning:
                raise RecordError("special_token", "the reasoning of a turn contains its own mark, <think> or </think>")
        self._check_strings(strings_in(record.tools), "the tools", is_structured=True)

    def _check_strings(self, texts: Iterable[str], where: str, *, is_structured: bool = False) -> None:
        for text in texts:
            forged = self._forged.search(f"<{text}>" if is_structured else text)
            if forged:
                raise RecordError("special_token", f"{where} contains {would_forge(forged.group())}")
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise RecordError("bad_text", f"{where} is not valid Unicode: {error}") from error

    def _text(self, turns: list[dict[str, Any]], **kwargs: Any) -> str:
        return str(self._asked(self._rendering.text, turns, **kwargs))

    def _asked(self, render: Callable[..., Any], turns: list[dict[str, Any]], **kwargs: Any) -> Any:
        from jinja2 import TemplateError

        try:
            return render(turns, **kwargs)
        except TemplateError as error:
            # Templates refuse conversations by raising: a system turn in the middle, two user turns in a row, ...
            raise RecordError("template", f"the chat template refuses this conversation: {error}") from error


def _template_turn(message: Message) -> dict[str, Any]:
    """A message as templates expect it: plain text as a string, otherwise typed parts."""
    if all(isinstance(part, str) for part in message.parts):
        return {"role": message.role, "content": message.text, **message.template_fields}
    parts = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image"} for p in message.parts]
    return {"role": message.role, "content": parts, **message.template_fields}


def _holds(span: str, message: Message) -> bool:
    """Whether what the assistant wrote stands there whole: reasoning, text, and the calls by their names."""
    names = [call["function"]["name"] for call in message.tool_calls]
    place = 0
    for piece in (message.reasoning.strip(), message.text.strip(), *names):
        found = span.find(piece, place)
        if found < 0:
            return False
        place = found + len(piece)
    return True


def _refuse_lost_text(messages: list[Message], text: str) -> None:
    """Raises RecordError unless all that others than the assistant say stands in the rendered text."""
    place = 0  # templates keep the order, so that each search starts where the last one ended
    for i, message in enumerate(messages):
        for part in message.parts if message.role != "assistant" else ():
            said = part.strip() if isinstance(part, str) else ""
            found = text.find(said, place)
            if found < 0 and (found := text.find(said)) < 0:
                raise RecordError("template", f"turn {i + 1}: the chat template leaves out {part!r:.60}")
            place = max(place, found + len(said))
