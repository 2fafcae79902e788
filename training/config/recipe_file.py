"""The file of a recipe: YAML whose every line counts. What YAML itself would drop or multiply in silence is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from pixelprune.files import path_meant
from training.config.settings import ConfigError


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-5 as text; numbers in recipes are numbers. Keys are unique, nothing is an alias."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.constructor.ConstructorError(
                None, None, f"alias *{event.anchor} (a few lines of them can stand for gigabytes)", event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        lines: dict[str, int] = {}
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                continue  # as a key of a dictionary it is refused below
            key, line = key_node.value, key_node.start_mark.line + 1
            if key in lines:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} stands twice, in lines {lines[key]} and {line}", key_node.start_mark
                )
            lines[key] = line
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def parse_yaml(text: str) -> Any:
    """The value of a piece of YAML. ConfigError (without a file's name) where it is none, or not one for recipes."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(_what_and_where(error)) from error
    except (ValueError, RecursionError) as error:  # a date like 2026-99-99; a thousand brackets
        raise ConfigError(f"not valid YAML: {str(error) or type(error).__name__}") from error


def recipe_chain(path: Path, seen: tuple[Path, ...] = ()) -> list[tuple[str, dict[str, Any]]]:
    """(file, content) of a recipe and of what it is `base`d on, the last base first. Raises ConfigError."""
    content = _read(path)
    base = content.pop("base", None)
    if base is None:
        return [(str(path), content)]
    if not isinstance(base, str) or not base.strip():
        raise ConfigError(
            f"{path}: base: expected another recipe's file name, relative to this one, got {base!r} "
            f"({type(base).__name__})"
        )
    other = path.parent / base
    seen = (*seen, path.resolve())
    if other.resolve() in seen:
        circle = " -> ".join(entry.name for entry in (*seen, other))
        raise ConfigError(f"{path}: recipes are based on each other in a circle: {circle}")
    return [*recipe_chain(other, seen), (str(path), content)]


def _read(path: Path) -> dict[str, Any]:
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        meant = path_meant(path)
        raise ConfigError(f"{path}: no such recipe" + (f"; did you mean {meant}?" if meant else "")) from error
    except OSError as error:
        raise ConfigError(f"{str(path)[:200]}: cannot be read as a recipe: {error.strerror}") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        hint = "; it looks like UTF-16: save it as UTF-8" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        raise ConfigError(f"{path}: expected UTF-8 text, byte {error.start} is none{hint}") from error
    try:
        content = parse_yaml(text)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected sections like `optim:` at the top level, got a {type(content).__name__}")
    return content


def _what_and_where(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem:
        mark = error.problem_mark
        return f"not valid YAML: {error.problem}" + (
            f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        )
    return f"not valid YAML: {' '.join(str(error).split())}"
