"""What a chat template does with a conversation, found by asking it.

What it has a place for: a template drops what it does not know without a word. Where it writes each answer: by
rendering the conversation up to an assistant turn, or with other answers in its place.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np

from pixelprune.records.record import Message, RecordError

__all__ = ["AnswerPlaces", "Span", "TemplateFacts", "Tools", "any_of", "rewritten"]

PROBE = "wxprobexw"
"""No template's own text."""

Span = tuple[int, int]
"""Characters [start, end) of the rendered conversation."""

Tools = list[dict[str, Any]] | None

SENTINELS = ("q", "z")
"""Answers put in place of the real one to see where the template writes an answer; nothing in common at either end."""


class TemplateFacts:
    """Asked once each. render: turns and keyword arguments of the template -> text; raises RecordError."""

    def __init__(self, render: Callable[..., str]):
        self._render = render

    @cached_property
    def has_tools(self) -> bool:
        """Whether schemas of tools are written."""
        return self._shows([_user("q")], tools=[{"type": "function", "function": {"name": PROBE, "parameters": {}}}])

    @cached_property
    def has_calls(self) -> bool:
        """Whether an assistant's tool calls are written."""
        call = {"type": "function", "function": {"name": PROBE, "arguments": {}}}
        return self._shows([_user("q"), {"role": "assistant", "content": "", "tool_calls": [call]}])

    @cached_property
    def has_answers(self) -> bool:
        """Whether a tool's turns are written."""
        turns = [_user("q"), {"role": "assistant", "content": "z"}, {"role": "tool", "content": PROBE}]
        return self._shows(turns)

    @cached_property
    def has_reasoning(self) -> bool:
        """Whether the last answer's reasoning is written."""
        return self._shows([_user("q"), {"role": "assistant", "content": "z", "reasoning_content": PROBE}])

    @cached_property
    def prompts(self) -> list[str]:
        """The ways it asks for an answer: the default's, then those with reasoning switched on and off."""
        found = []
        for choice in ({}, {"enable_thinking": True}, {"enable_thinking": False}):
            bare = self._render([_user("q")], **choice)
            asked = self._render([_user("q")], add_generation_prompt=True, **choice)
            if asked.startswith(bare):
                found.append(asked[len(bare) :])
        return found

    def _shows(self, turns: list[dict[str, Any]], **kwargs: Any) -> bool:
        try:
            return PROBE in self._render(turns, **kwargs)
        except RecordError:
            return False


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


class AnswerPlaces:
    """Where assistant turns stand in the rendered conversation, for one template.

    render: as of `TemplateFacts`. control: the control tokens, which no turn of a conversation holds.
    supervise_empty_reasoning: whether an empty block of reasoning that the template opens an answer with is the
    assistant's.
    """

    def __init__(
        self,
        render: Callable[..., str],
        template: TemplateFacts,
        control: tuple[str, ...],
        supervise_empty_reasoning: bool,
    ):
        self._render, self.template = render, template
        self._control, self._forged = control, any_of(control)
        self.supervise_empty_reasoning = supervise_empty_reasoning

    def find(
        self, turns: list[dict[str, Any]], text: str, messages: list[Message], trained: list[int], tools: Tools
    ) -> dict[int, Span]:
        """The span of each turn of `trained`, end token included. turns, text: as the template got and rendered them.

        Raises RecordError (template) for an answer that the template rewrites.
        """
        named = self._plain_spans(turns, text, messages, trained, tools)
        named |= self._rich_spans(turns, text, messages, trained, tools)
        return named | {i: self._span(turns, i, text, messages[i], tools) for i in trained if i not in named}

    def _plain_spans(
        self, turns: list[dict[str, Any]], text: str, messages: list[Message], trained: list[int], tools: Tools
    ) -> dict[int, Span]:
        """Assistant turns that are text alone, all with two renderings: those of a thousand turns one by one would
        render a million. Turns for which that does not tell where they stand are left out.

        With one letter in place of each of these answers, and another, the renderings differ there and nowhere else;
        the text must be what stands between these places, with the answers in them.
        """
        plain = [i for i in trained if i > 0 and not messages[i].template_fields]
        if len(plain) < 2:
            return {}
        one, places = self._with_letters(turns, plain, tools)
        if len(places) != len(plain):
            return {}
        spans: dict[int, Span] = {}
        place = before = 0  # in the text, in the rendering with letters
        for i, at, following in zip(plain, places, [*places[1:], len(one)], strict=True):
            place += at - before
            if not text.startswith(one[before:at], place - (at - before)):
                return {}
            tail = one[at + 1 : following]
            content = turns[i]["content"]
            ends = [place + len(s) for s in (content, content.strip()) if text.startswith(s + tail, place)]
            if not ends:
                return {}
            token = self._forged.match(text, ends[0])
            start = self._plain_start(text, place)
            if start is not None and token and not self._forged.match(text, token.end()):
                spans[i] = start, token.end()
            place, before = ends[0], at + 1
        return spans if place + len(one) - before == len(text) else {}

    def _rich_spans(
        self, turns: list[dict[str, Any]], text: str, messages: list[Message], trained: list[int], tools: Tools
    ) -> dict[int, Span]:
        """The same for assistant turns that call tools or reason: as one by one (`_span_by_substitution`), all at once.

        No turn holds a control token, so these cut both texts into the same pieces: those without a letter must be
        equal, and the answer lies within the piece that the letter is in.
        """
        rich = [i for i in trained if messages[i].template_fields]
        if len(rich) < 2:
            return {}
        one, places = self._with_letters(turns, rich, tools)
        mine, others = ([match.span() for match in self._forged.finditer(t)] for t in (text, one))
        if len(places) != len(rich) or [text[slice(*s)] for s in mine] != [one[slice(*s)] for s in others]:
            return {}
        answer_of = dict(zip(np.searchsorted([start for start, _ in others], places).tolist(), rich, strict=True))
        if len(answer_of) < len(rich):
            return {}
        spans: dict[int, Span] = {}
        letters = iter(places)
        for k, ((begin, end), (other_begin, other_end)) in enumerate(
            zip(_between(mine, len(text)), _between(others, len(one)), strict=True)
        ):
            if k not in answer_of:
                if text[begin:end] != one[other_begin:other_end]:
                    return {}
                continue
            letter, i = next(letters), answer_of[k]
            head, tail = one[other_begin:letter], one[letter + 1 : other_end]
            end -= len(tail)
            if end < begin or not text.startswith(tail, end):
                return {}
            shared = begin + _shared_length(head, text[begin:end])
            spans[i] = self._answer_span(text, i, turns, messages[i], shared, end, shared == begin + len(head))
        return spans

    def _with_letters(self, turns: list[dict[str, Any]], those: list[int], tools: Tools) -> tuple[str, list[int]]:
        """The conversation with a letter in place of each of those answers, and where it differs from one with
        another."""
        swapped = set(those)
        one, other = (
            self._render(
                [{"role": "assistant", "content": s} if i in swapped else t for i, t in enumerate(turns)], tools=tools
            )
            for s in SENTINELS
        )
        return one, _differing(one, other)

    def _plain_start(self, text: str, place: int) -> int | None:
        """Where an answer begins whose text stands at `place`: behind what the generation prompt gives. None where one
        look does not tell."""
        if not self.supervise_empty_reasoning and self.template.has_reasoning:
            return place
        start = self._behind_prompt(text, place, self.template.prompts[:1]) or place
        return start if start == place or self.supervise_empty_reasoning else None

    def _span(self, turns: list[dict[str, Any]], i: int, text: str, message: Message, tools: Tools) -> Span:
        """Where assistant turn i stands: from the end of its header to its end token."""
        is_plain = not message.template_fields and (self.supervise_empty_reasoning or not self.template.has_reasoning)
        if i > 0 and is_plain:  # many templates cannot render an empty conversation
            header = self._render(turns[:i], tools=tools, add_generation_prompt=True)
            upto = text if i == len(turns) - 1 else self._render(turns[: i + 1], tools=tools)
            if upto.startswith(header) and text.startswith(upto):
                return len(header), self._end(text, len(header), len(upto))
        return self._span_by_substitution(turns, i, text, message, tools)

    def _span_by_substitution(
        self, turns: list[dict[str, Any]], i: int, text: str, message: Message, tools: Tools
    ) -> Span:
        """For templates that write a turn differently once it is history, and for turns that are more than a text.

        Two other answers in this turn's place share with each other everything but the answer.
        """
        one, other = (
            self._render([*turns[:i], {"role": "assistant", "content": s}, *turns[i + 1 :]], tools=tools)
            for s in SENTINELS
        )
        answer_at = _shared_length(one, other)  # where a bare answer begins
        tail = one[answer_at + 1 :]
        end = len(text) - len(tail)
        shared = _shared_length(one[:answer_at], text[: max(end, 0)])
        if not text.endswith(tail) or end < shared:
            raise rewritten(i)
        return self._answer_span(text, i, turns, message, shared, end, shared == answer_at)

    def _answer_span(
        self, text: str, i: int, turns: list[dict[str, Any]], message: Message, shared: int, end: int, is_bare: bool
    ) -> Span:
        """The span of answer i, of which another answer in its place told that it begins at `shared` or before, and
        ends at `end`. is_bare: it begins as a bare answer would."""
        start = shared
        if message.reasoning:
            start = self._behind_prompt(text, shared, self.template.prompts) or shared
        elif is_bare and self.supervise_empty_reasoning:
            start = self._behind_prompt(text, shared, self.template.prompts[:1]) or shared
        if not message.template_fields and text[shared:end].strip() != turns[i]["content"].strip():
            raise rewritten(i)
        rest = self._forged.match(text, end)
        return start, rest.end() if rest else end

    def _behind_prompt(self, text: str, place: int, prompts: list[str]) -> int | None:
        """The end of the longest generation prompt that the turn around `place` begins with."""
        for prompt in sorted(prompts, key=len, reverse=True):
            token = self._forged.match(prompt)  # no answer holds a control token, so the last one opens the turn
            start = text.rfind(token.group(), 0, place) if token else place - len(prompt)
            if start >= 0 and text.startswith(prompt, start):
                return start + len(prompt)
        return None

    def _end(self, text: str, start: int, end: int) -> int:
        """Leave out the white space that templates put after the end token: generation stops before it."""
        stripped = start + len(text[start:end].rstrip())
        return stripped if text[start:stripped].endswith(self._control) else end


def any_of(tokens: tuple[str, ...]) -> re.Pattern[str]:
    """Finds each of the tokens, given longest first; nothing where there are none."""
    return re.compile("|".join(map(re.escape, tokens)) or r"(?!)")


def _differing(one: str, other: str) -> list[int]:
    """Places at which two strings of one length differ; none for strings of different lengths."""
    if len(one) != len(other):
        return []
    codes = (np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32) for text in (one, other))
    places: list[int] = np.flatnonzero(np.not_equal(*codes)).tolist()
    return places


def _between(tokens: list[Span], length: int) -> list[Span]:
    """What lies before, between and behind the tokens of a text of that length."""
    return list(zip([0, *(end for _, end in tokens)], [*(start for start, _ in tokens), length], strict=True))


def _shared_length(one: str, other: str) -> int:
    """Compared slice by slice in halves: letter by letter takes Python seconds for a long conversation."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def rewritten(i: int) -> RecordError:
    return RecordError(
        "template",
        f"turn {i + 1}: the chat template rewrites this answer, or leaves its reasoning out, so it cannot be trained "
        "on as it was written; mark it in the template with {% generation %} ... {% endgeneration %}, leave it out "
        '("loss": false in the turn), or train on the last answer alone (data.last_turn_only)',
    )
