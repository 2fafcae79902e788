"""Records that are a question and its answer under keys of their own -> the same as `messages`.

prompt/completion     TRL: texts, or lists of turns; answers within the prompt are read and not trained on, as there
query/response        ms-swift, with `history`: a list of [question, answer], trained on like the rest
instruction/output    Alpaca, with `input` on a line of its own behind the instruction, and `history`

And content parts whose text, image, reasoning or call stands under `value`, as LLaMA-Factory's v1 writes them
(hiyouga/LLaMA-Factory, src/llamafactory/v1/core/rendering/format.py, commit ff6d4d1) -> the parts that others write.
"""

from __future__ import annotations

from typing import Any

from pixelprune.records.keys import KeyRules, is_empty
from pixelprune.records.record import RecordError

__all__ = ["CALL_PART", "SHAPE_KEYS", "as_messages", "of_value_part"]

_SHAPES = (
    ("prompt", "completion", ()),
    ("query", "response", ("history",)),
    ("instruction", "output", ("input", "history")),
)
SHAPE_KEYS = tuple(dict.fromkeys(key for ask, answer, more in _SHAPES for key in (ask, answer, *more)))


def as_messages(row: dict[str, Any], rules: KeyRules) -> dict[str, Any]:
    """The row with `messages`; a row that has turns, or no pair of these keys, as it is.

    Raises RecordError (bad_content) for questions, answers and histories of another form.
    """
    if any(not is_empty(row.get(key)) for key in ("messages", "conversations")):
        return row
    for ask, answer, more in _SHAPES:
        if all(row.get(key) is not None and key not in rules.ignore for key in (ask, answer)):
            used = [key for key in (ask, answer, *more) if key not in rules.ignore]
            said = {key: row[key] for key in used if not is_empty(row.get(key))}
            if rules.seen is not None:
                rules.seen.update({("record", key, "read"): 1 for key in said})
            messages = _turns(said, ask, answer)
            return {key: value for key, value in row.items() if key not in used} | {"messages": messages}
    return row


def _turns(said: dict[str, Any], ask: str, answer: str) -> list[Any]:
    pairs, history = said.get("history", []), list[Any]()
    if not isinstance(pairs, list | tuple):
        raise RecordError("bad_content", f"history is {type(pairs).__name__}, expected pairs of question and answer")
    for pair in pairs:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise RecordError("bad_content", f"history holds {pair!r:.60}, expected pairs of question and answer")
        history += [_turn("user", pair[0], "history"), _turn("assistant", pair[1], "history")]
    question, reply = said.get(ask, ""), said.get(answer, "")
    if ask == "prompt" and isinstance(question, list) and isinstance(reply, list):
        given = [{**t, "loss": False} if isinstance(t, dict) and t.get("role") == "assistant" else t for t in question]
        return given + reply
    if "input" in said:
        question = f"{question}\n{_text(said['input'], 'input')}" if _text(question, ask) else said["input"]
    return [*history, _turn("user", question, ask), _turn("assistant", reply, answer)]


def _turn(role: str, text: Any, key: str) -> dict[str, str]:
    return {"role": role, "content": _text(text, key)}


def _text(text: Any, key: str) -> str:
    if not isinstance(text, str):
        raise RecordError("bad_content", f"{key} is {type(text).__name__}, expected text")
    return text


CALL_PART = "tool_call"
"""The type of a part that is a call of the assistant."""
_VALUE_PARTS = {"text": "text", "image_url": "image_url", "reasoning": "reasoning", CALL_PART: CALL_PART}
"""Type of a part with `value` -> the key that the same part has in other formats."""


def of_value_part(part: Any) -> Any:
    """The part with its `value` under the key of its type; any other part as it is."""
    if not isinstance(part, dict) or part.get("value") is None:
        return part
    key = _VALUE_PARTS.get(str(part.get("type")))
    if key is None or part.get(key) is not None:
        return part  # refused for `value`, or for its type
    return {name: value for name, value in part.items() if name != "value"} | {key: part["value"]}
