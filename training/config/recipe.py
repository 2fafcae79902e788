"""A recipe (YAML) and `key=value` overrides to a checked Config; every mistake is one line naming the field."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from training.config.recipe_file import parse_yaml, recipe_chain
from training.config.rules import check_config
from training.config.settings import Config, ConfigError

_NAMES_ELSEWHERE = {
    "learning_rate": "lr",
    "batch_size": "samples_per_step",
    "global_batch_size": "samples_per_step",
    "per_device_train_batch_size": "samples_per_step",
    "gradient_accumulation_steps": "samples_per_step",
    "max_length": "pack_tokens",
    "cutoff_len": "pack_tokens",
    "max_seq_length": "pack_tokens",
    "num_train_epochs": "epochs",
    "warmup_ratio": "warmup_steps",
    "save_steps": "every_steps",
    "save_total_limit": "keep_last",
    "eval_steps": "every_steps",
    "logging_steps": "log_every",
    "model_name_or_path": "path",
    "attn_implementation": "attention",
    "flash_attn": "attention",
    "gradient_checkpointing": "recompute_llm",
    "lora_rank": "rank",
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "report_to": "wandb",
    "output_dir": "folder",
    "run_name": "name",
}
"""What Hugging Face's Trainer, ms-swift and LLaMA-Factory call fields of ours."""


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Config:
    """The typed, checked configuration of a run.

    A recipe may name another one with a top-level `base: other.yaml` (relative to itself) and then states only what
    differs. Overrides are dotted, `optim.lr=2e-5` or `data.sources.0.weight=3`, and win over the recipe.

    Raises ConfigError: missing or malformed file, unknown key (the nearest valid one is named), wrong type, impossible
    combination, or an interpolation (`${...}`), which would hide what a run was made of.
    """
    tree = OmegaConf.structured(Config)
    _make_writable(tree)
    for source, content in recipe_chain(Path(path)):
        _refuse_interpolation(content, source)
        _check_keys(content, Config, prefix="", source=source)
        tree = _merge(tree, content, source)
    for override in overrides or []:
        tree = _with_override(tree, override)
    config = _built(tree)
    check_config(config)
    return config


def config_to_dict(config: Config) -> dict:
    """Plain containers, for saving with checkpoints and for tracking."""
    return dataclasses.asdict(config)


def config_from_dict(content: dict) -> Config:
    """The inverse of `config_to_dict`, as strict as a recipe. Raises ConfigError."""
    tree = OmegaConf.structured(Config)
    _make_writable(tree)
    _check_keys(content, Config, prefix="", source="saved config")
    return _built(_merge(tree, content, "saved config"))


def _built(tree: DictConfig) -> Config:
    """The dataclasses of a tree, innermost first, so that a value out of its range is named by its whole key."""
    try:
        content = OmegaConf.to_container(tree, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(_one_line(error)) from error
    config = _build(Config, content, "")
    assert isinstance(config, Config)
    return config


def _build(kind: Any, content: Any, prefix: str) -> Any:
    if get_origin(kind) is list:
        return [_build(get_args(kind)[0], item, f"{prefix}.{number}") for number, item in enumerate(content)]
    if not dataclasses.is_dataclass(kind):
        return content
    hints = get_type_hints(kind)
    values = {key: _build(hints[key], value, f"{prefix}.{key}".lstrip(".")) for key, value in content.items()}
    try:
        return kind(**values)  # type: ignore[operator]
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{prefix}.{error}") from error


def show(config: Config) -> str:
    """The resolved tree as YAML."""
    return yaml.safe_dump(config_to_dict(config), sort_keys=False)


def _make_writable(node: Any) -> None:
    """OmegaConf makes frozen dataclasses read-only; a recipe must still be able to set their fields."""
    OmegaConf.set_readonly(node, False)
    children = node.values() if isinstance(node, DictConfig) else node
    for child in children:
        if isinstance(child, (DictConfig, ListConfig)):
            _make_writable(child)


def _merge(tree: DictConfig, content: dict, source: str) -> DictConfig:
    try:
        merged = OmegaConf.merge(tree, content)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{source}: {_one_line(error)}") from error
    assert isinstance(merged, DictConfig)
    return merged


def _with_override(tree: DictConfig, override: str) -> DictConfig:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r}: expected key=value, for example optim.lr=2e-5")
    try:
        value = parse_yaml(text) if text else ""
    except ConfigError as error:
        raise ConfigError(f"override {override!r}: not a valid value: {error}") from error
    _refuse_interpolation({key: value}, "command line")
    value = _as_word(value, _check_path(key, tree))
    parts = key.split(".")
    if isinstance(value, (dict, list)) and not any(part.isdigit() for part in parts):
        # A whole section or list, as a recipe would state it.
        content: Any = value
        for part in reversed(parts):
            content = {part: content}
        _check_keys(content, Config, prefix="", source="command line")
        tree = _merge(tree, content, f"override {override!r}")
        _make_writable(tree)
        return tree
    try:
        OmegaConf.update(tree, key, value, merge=isinstance(value, dict))
    except (OmegaConfBaseException, IndexError, ValueError) as error:
        raise ConfigError(f"override {override!r}: {_one_line(error)}") from error
    return tree


def unknown_key(dotted: str) -> ConfigError:
    """What a key that no recipe may hold is answered with."""
    tree = OmegaConf.structured(Config)
    try:
        _check_path(dotted, tree)
    except ConfigError as error:
        return error
    return ConfigError(f"unknown key {dotted!r}")


def _check_path(dotted: str, tree: DictConfig) -> Any:
    """The type of a dotted key, walked to through the dataclasses: a typo is answered with the nearest field."""
    kind: Any = Config
    walked = ""
    for part in dotted.split("."):
        if get_origin(kind) is list:
            if not part.isdigit():
                raise ConfigError(f"{walked}: expected a list index, got {part!r}, as in {walked}.0")
            num_entries = len(OmegaConf.select(tree, walked))
            if int(part) >= num_entries:
                raise ConfigError(_no_such_entry(dotted, walked, num_entries))
            kind = get_args(kind)[0]
        elif dataclasses.is_dataclass(kind):
            kind = _field_type(kind, part, walked, "command line")
        elif get_origin(kind) is not dict and kind is not dict:
            raise ConfigError(f"command line: {walked} has no fields, got {dotted!r}")
        walked = f"{walked}.{part}" if walked else part
    return kind


def _as_word(value: Any, kind: Any) -> Any:
    """YAML reads off as false: the word again, where it is one of a field's choices."""
    return "off" if value is False and get_origin(kind) is Literal and "off" in get_args(kind) else value


def _no_such_entry(dotted: str, walked: str, num_entries: int) -> str:
    has = f"{num_entries} entr{'y' if num_entries == 1 else 'ies'}, counted from 0"
    example = "[{path: A.jsonl}, {path: B.jsonl}]"
    return (
        f"{dotted}: {walked} has {has}; to add one, write it into the recipe (a further `- path: ...` below {walked}), "
        f"or give the whole list: '{walked}={example}'"
    )


def _check_keys(content: Any, kind: Any, *, prefix: str, source: str) -> None:
    if dataclasses.is_dataclass(kind) and isinstance(content, dict):
        for key, value in content.items():
            inner = _field_type(kind, str(key), prefix, source)
            content[key] = value = _as_word(value, inner)
            _check_keys(value, inner, prefix=f"{prefix}.{key}" if prefix else str(key), source=source)
    elif get_origin(kind) is list and isinstance(content, list):
        for position, item in enumerate(content):
            _check_keys(item, get_args(kind)[0], prefix=f"{prefix}.{position}", source=source)


def _field_type(kind: Any, key: str, prefix: str, source: str) -> Any:
    hints = get_type_hints(kind)
    if key in hints:
        return hints[key]
    name = f"{prefix}.{key}" if prefix else key
    deeper = [] if prefix else _in_sections(key)
    close = [f"{prefix}.{one}".lstrip(".") for one in _nearest(key, hints)]
    meant = " or ".join(map(repr, deeper or close))
    advice = f"did you mean {meant}?" if meant else f"valid keys are {', '.join(hints)}"
    raise ConfigError(f"{source}: unknown key {name!r}; {advice}")


def _in_sections(key: str) -> list[str]:
    """Where a key that was given without its section stands, under its name here or elsewhere."""
    field = _NAMES_ELSEWHERE.get(key, key)
    sections = get_type_hints(Config).items()
    return [f"{name}.{field}" for name, kind in sections if field in get_type_hints(kind)]


def _nearest(key: str, fields: Iterable[str]) -> list[str]:
    """The field that was probably meant: what other trainers call it counts as near, also misspelt."""
    names = {name: name for name in fields}
    names |= {other: name for other, name in _NAMES_ELSEWHERE.items() if name in names}
    return [names[close] for close in difflib.get_close_matches(key, names, n=1, cutoff=0.55)]


def _refuse_interpolation(content: Any, source: str) -> None:
    if isinstance(content, dict):
        content = list(content.values())
    if isinstance(content, list):
        for item in content:
            _refuse_interpolation(item, source)
    elif isinstance(content, str) and "${" in content:
        raise ConfigError(
            f"{source}: interpolation {content!r} is refused; write the value, or override it on the command line"
        )


_KINDS = {"converted to Float": "a number", "converted to Integer": "a whole number", "a valid bool": "true or false"}
_CONVERSION = re.compile(rf"Value '(?P<value>.*?)' .*(?P<kind>{'|'.join(_KINDS)}).*")
_CHOICE = re.compile(r"Invalid value (?P<value>.*), expected one of \[(?P<choices>.*)\]")


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    key = next((line.removeprefix("full_key:").strip() for line in lines if line.startswith("full_key:")), "")
    if choice := _CHOICE.fullmatch(lines[0] if lines else ""):
        return f"{key}: expected one of {choice['choices'].replace(chr(39), '')}, got {choice['value']}"
    if conversion := _CONVERSION.fullmatch(lines[0] if lines else ""):
        return f"{key}: expected {_KINDS[conversion['kind']]}, got {conversion['value']!r}"
    return f"{key}: {lines[0]}" if key and key not in lines[0] else lines[0] if lines else type(error).__name__
