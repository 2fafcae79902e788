"""Agents' parts of a record: tools, tool calls and reasoning, from the forms they are published in to one."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from pixelprune.records.keys import KeyRules, is_empty
from pixelprune.records.record import RecordError

__all__ = [
    "CALL_ROLES",
    "REASONING_KEYS",
    "REASONING_PARTS",
    "TOOL_ROLES",
    "reasoning_of",
    "split_reasoning",
    "strings_in",
    "tool_calls_of",
    "tools_of",
]

TOOL_ROLES = ("tool", "tool_response", "observation")
"""Turns that hold what a tool answered: OpenAI's, ms-swift's and LLaMA-Factory's name."""
CALL_ROLES = ("function_call", "tool_call")
"""Turns whose text is a call as JSON: LLaMA-Factory's and ms-swift's name."""
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
"""Keys of an assistant turn that hold its reasoning."""
REASONING_PARTS = ("thinking", "reasoning")
"""Types of content parts that hold it; the text stands under the type's own name, or under `text`."""

_CALL_KEYS = ("id", "type", "function", "name", "arguments")
_FUNCTION_KEYS = ("name", "arguments")
_THOUGHT_FIRST = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)


def tools_of(value: Any) -> tuple[dict[str, Any], ...]:
    """The record's tools, a list of schemas or its JSON text, as the chat template takes them.

    None within a schema means absent: tables have one where another row has a key. Raises RecordError (bad_tools).
    """
    if is_empty(value):
        return ()
    tools = _parsed(value, "tools")
    tools = [_parsed(tool, "a tool") for tool in (tools if isinstance(tools, list | tuple) else [tools])]
    for tool in tools:
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RecordError("bad_tools", f"a tool is {tool!r:.80}, expected an object with the function's name")
    return tuple(_without_none(tool) for tool in tools)


def tool_calls_of(value: Any, rules: KeyRules) -> tuple[dict[str, Any], ...]:
    """Calls, as objects or JSON text, in OpenAI's form with their arguments as objects.

    Raises RecordError with reason bad_tools or unread_key.
    """
    if is_empty(value):
        return ()
    calls = _parsed(value, "a tool call")
    return tuple(_tool_call(call, rules) for call in (calls if isinstance(calls, list | tuple) else [calls]))


def _tool_call(value: Any, rules: KeyRules) -> dict[str, Any]:
    call = _parsed(value, "a tool call")
    if not isinstance(call, Mapping):
        raise RecordError("bad_tools", f"a tool call is {value!r:.80}, expected an object")
    call = rules.checked(call, "part", _CALL_KEYS)
    if call.get("type", "function") != "function":
        raise RecordError("bad_tools", f"a tool call is of type {call['type']!r:.40}, expected function")
    function = call
    if "function" in call:
        if "name" in call or "arguments" in call or not isinstance(call["function"], Mapping):
            raise RecordError("bad_tools", f"a tool call is {value!r:.80}, expected one function with its arguments")
        function = rules.checked(call["function"], "part", _FUNCTION_KEYS)
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise RecordError("bad_tools", f"a tool call names {name!r:.40}, expected a function's name")
    arguments = function.get("arguments", {})
    if not isinstance(arguments, str):
        arguments = _without_none(arguments)
    elif arguments.strip():
        arguments = _parsed(arguments, f"the arguments of {name!r:.40}")
    else:
        arguments = {}
    if not isinstance(arguments, Mapping):
        raise RecordError("bad_tools", f"the arguments of {name!r:.40} are {arguments!r:.80}, expected an object")
    identity = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {"type": "function", **identity, "function": {"name": name, "arguments": dict(arguments)}}


def reasoning_of(turn: Mapping[str, Any]) -> str:
    """What a turn says under one of REASONING_KEYS; "" for nothing. Raises RecordError (bad_content)."""
    said = [turn[key] for key in REASONING_KEYS if not is_empty(turn.get(key))]
    if any(value != said[0] for value in said):
        raise RecordError("bad_content", "a turn holds several reasonings that differ: give one of them")
    if said and not isinstance(said[0], str):
        raise RecordError("bad_content", f"the reasoning of a turn is {type(said[0]).__name__}, expected a string")
    return said[0] if said else ""


def split_reasoning(text: str) -> tuple[str, str]:
    """(reasoning, answer) of an answer that begins with <think>...</think>, as reasoning templates split it."""
    found = _THOUGHT_FIRST.fullmatch(text)
    if not found or "</think>" in found[2] or "<think>" in found[1]:
        return "", text
    return found[1].strip("\n"), found[2].lstrip("\n")


def strings_in(value: Any) -> Iterator[str]:
    """Every string of a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield str(key)
            yield from strings_in(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from strings_in(inner)


def _parsed(value: Any, what: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RecordError("bad_tools", f"{what}: not valid JSON: {error}") from error


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list | tuple):
        return [_without_none(inner) for inner in value]
    return value
