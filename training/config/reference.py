"""Every setting with its default, allowed values and meaning, out of the typed tree itself: docs/settings.md and
`python -m training KEY` are made here.

Meanings are the docstrings under the fields, ranges what `check_fields` holds them to.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from training.config.ranges import ranges_of
from training.config.recipe import unknown_key
from training.config.settings import Config
from training.data.settings import SourceSettings

INDEX = "N"
"""Stands for the number of an entry in the key of a list's fields: data.sources.N.path."""


@dataclass(frozen=True)
class Setting:
    """One field of the tree. allowed: in words; default: as a recipe writes it, "" where it must be given."""

    key: str
    default: str
    allowed: str
    meaning: str


@dataclass(frozen=True)
class Section:
    """Fields that stand together. key: "" for the top of the tree."""

    key: str
    meaning: str
    settings: list[Setting]


def sections() -> Iterator[Section]:
    """All of the tree in the order of `Config`; what lies deeper comes behind what holds it."""
    SourceSettings("x")  # its ranges are known once one was made, as those of the others are by their defaults
    Config()
    for name, kind in get_type_hints(Config).items():
        yield from _sections(name, kind)


def explain(key: str) -> str:
    """A setting, or a section with all in it, as text. Raises ConfigError naming the nearest key."""
    wanted = ".".join(INDEX if part.isdigit() else part for part in key.split("."))
    for section in sections():
        if section.key == wanted:
            fields = "\n\n".join(_text(setting) for setting in section.settings)
            return f"{section.key}: {section.meaning}\n\n{fields}"
        for setting in section.settings:
            if setting.key == wanted:
                return _text(setting)
    raise unknown_key(key)


def markdown() -> str:
    """The whole reference as a page."""
    parts = [_HEAD]
    for section in sections():
        rows = [
            f"| `{_cell(setting.key)}` | {f'`{_cell(setting.default)}`' if setting.default else 'must be given'} "
            f"| {_cell(setting.allowed)} | {_cell(setting.meaning)} |"
            for setting in section.settings
        ]
        table = "\n".join(["| setting | default | values | meaning |", "|---|---|---|---|", *rows])
        parts.append(f"## {section.key}\n\n{section.meaning}\n\n{table}\n")
    return "\n".join(parts)


_HEAD = """\
# Settings

Every setting of a recipe: defaults < recipe < command line (`optim.lr=2e-5`). This page is made from the typed tree by
`python -m training --settings`; `python -m training optim.lr` prints one of them, `python -m training optim` a section.
`python -m training.train RECIPE --show` prints a recipe with all of them resolved. `N` counts a list's entries from 0.
"""


def _sections(key: str, kind: Any) -> Iterator[Section]:
    """`kind`, a dataclass, as the section `key`, and those in it."""
    hints, meanings, ranges = get_type_hints(kind), meanings_of(kind), ranges_of(kind)
    own, inner = [], []
    for field in dataclasses.fields(kind):
        name, hint = f"{key}.{field.name}", hints[field.name]
        item = get_args(hint)[0] if get_origin(hint) is list else None
        if dataclasses.is_dataclass(hint):
            inner.append((name, hint))
            continue
        if dataclasses.is_dataclass(item):
            inner.append((f"{name}.{INDEX}", item))
        allowed = ranges[field.name].expected if field.name in ranges else _allowed(hint)
        own.append(Setting(name, _default(field), allowed, meanings[field.name]))
    yield Section(key, _one_line(inspect.getdoc(kind) or ""), own)
    for name, hint in inner:
        yield from _sections(name, hint)


@functools.cache
def meanings_of(kind: type) -> dict[str, str]:
    """The docstring under each field of a dataclass, on one line; "" where there is none."""
    (node,) = ast.parse(inspect.getsource(kind)).body
    assert isinstance(node, ast.ClassDef)
    found: dict[str, str] = {}
    for statement, following in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            is_said = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
            found[statement.target.id] = _one_line(following.value.value) if is_said else ""  # type: ignore[union-attr]
    return found


def _default(field: dataclasses.Field) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return json.dumps(field.default_factory())
    if field.default is dataclasses.MISSING:
        return ""
    is_text = isinstance(field.default, str) and field.default
    return field.default if is_text else f"{field.default:g}" if _is_long(field.default) else json.dumps(field.default)


def _is_long(value: Any) -> bool:
    return isinstance(value, float) and value != int(value)


def _allowed(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return ", ".join(str(value) or '""' for value in get_args(hint))
    if get_origin(hint) is list:
        return "a list"
    if get_origin(hint) is dict or hint is dict:
        return "keys with values"
    if type(None) in get_args(hint):
        return f"{_allowed(next(arg for arg in get_args(hint) if arg is not type(None)))}, or null"
    return {bool: "true, false", int: "a whole number", float: "a number", str: "text"}[hint]


def _text(setting: Setting) -> str:
    default = f"default {setting.default}" if setting.default else "must be given"
    return f"{setting.key}  ({default}; {setting.allowed})\n  {setting.meaning}"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
