"""What a run's folder says of itself: recipe, answers, evaluations, what was left out. Only read, whatever is in it."""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from pixelprune.command.page import embedded_picture
from training.config.recipe import config_to_dict
from training.config.settings import Config
from training.data.settings import SourceSettings

logger = logging.getLogger(__name__)

RECIPE_FILE = "config.yaml"
MAX_ENTRIES = 200
"""Left-out records of a file that are shown; all are counted."""
MAX_ANSWERS = 40
"""Of a run's last evaluation while it trained, misses first."""
MAX_CHARS = 4000
"""Of one text from a file."""
_SHEET_SIDE = 2400
_FIGURES = ("num", "accuracy", "retain_ratio", "num_failed", "num_unparsed")


def read_recipe(folder: Path) -> dict[str, Any]:
    """The resolved recipe as it was written, {} where there is none that can be read."""
    path = folder / RECIPE_FILE
    if not path.exists():
        return {}
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        logger.warning("%s: cannot be read and is left out (%s)", path, str(error).splitlines()[0])
        return {}
    return content if isinstance(content, dict) else {}


def compare_recipes(recipes: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row per setting: its default, each recipe's value (None where it has none), whether they differ, whether one
    is not the default."""
    flat = [dict(_flat(recipe)) for recipe in recipes]
    source = dict(_flat(vars(SourceSettings("x"))))
    defaults = dict(_flat(config_to_dict(Config())))
    rows = []
    for key in dict.fromkeys(key for one in flat for key in one):
        parts = key.split(".")
        is_source = parts[0] == "data" and len(parts) > 3 and parts[1] in ("sources", "eval_sources")
        default = source.get(".".join(parts[3:])) if is_source and parts[3] != "path" else defaults.get(key)
        values = [one.get(key) for one in flat]
        rows.append(
            {
                "key": key,
                "default": default,
                "values": values,
                "differs": len(set(values)) > 1,
                "is_set": any(value != default for value in values if value is not None),
            }
        )
    return rows


def _flat(content: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys and their values as a recipe writes them."""
    items = content.items() if isinstance(content, Mapping) else enumerate(content)
    for key, value in items:
        name = f"{prefix}.{key}" if prefix else str(key)
        if (isinstance(value, Mapping) and value) or (
            isinstance(value, list | tuple) and any(isinstance(one, Mapping) for one in value)
        ):
            yield from _flat(value, name)
        else:
            yield name, cut(value if isinstance(value, str) else json.dumps(value, default=str))


def read_evaluations(folder: Path) -> list[dict[str, Any]]:
    """Passes of `training.evaluate` over this run's models: figures, and the sheet of misses and hits."""
    found = []
    for path in sorted(folder.glob("*-evaluation/*/result.json")):
        result = _read_json(path)
        score = _at(result, "overall", "all")
        figures = {name: finite(score.get(name)) for name in _FIGURES}
        prune = _at(result, "prune")
        found.append(
            {
                "name": f"{path.parent.parent.name}/{path.parent.name}",
                "strategy": cut(f"{prune.get('strategy', '')}, threshold {prune.get('threshold', '')}"),
                "sheet": _sheet(path.with_name("sheet.png")),
                **figures,
            }
        )
    return found


def _sheet(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        with Image.open(path) as picture:
            size = (picture.width, picture.height)
            return {"source": embedded_picture(picture, _SHEET_SIDE), "size": size}
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        logger.warning("%s: cannot be read and is left out (%s)", path, error)
        return None


def read_answers(folder: Path) -> list[dict[str, Any]]:
    """Answers of the last evaluation while the run trained, one entry per way of asking, misses first."""
    last: dict[str, Path] = {}
    for path in sorted(folder.glob("grounding/step-*.jsonl")):
        last[path.stem.partition("_")[2]] = path
    found = []
    for path in last.values():
        rows = sorted(_read_lines(path), key=lambda row: finite(row.get("score")) or 0.0)
        answers = [
            {
                "id": cut(row.get("id")),
                "score": finite(row.get("score")),
                "text": cut(row.get("error") or row.get("text")),
                "problem": cut(row.get("problem")),
            }
            for row in rows[:MAX_ANSWERS]
        ]
        sheet = _sheet(path.with_suffix(".png"))
        found.append({"name": path.stem, "num": len(rows), "answers": answers, "sheet": sheet})
    return found


def read_quarantines(folder: Path) -> list[dict[str, Any]]:
    """Records that the run left out, a table per file."""
    found = []
    for path in sorted(folder.glob("quarantine*.jsonl")):
        rows = _read_lines(path)
        if rows:
            reasons = Counter(cut(row.get("reason")) for row in rows).most_common()
            entries = [
                {key: cut(row.get(key)) for key in ("record", "file", "reason", "detail")} for row in rows[:MAX_ENTRIES]
            ]
            found.append({"file": path.name, "num": len(rows), "reasons": dict(reasons), "entries": entries})
    return found


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """Whole lines that are JSON objects; a run may be writing the last one."""
    *whole, _ = path.read_text(errors="replace").split("\n")
    rows = []
    for number, line in enumerate(whole, 1):
        try:
            row = json.loads(line)
        except ValueError:
            logger.warning("%s: line %d is damaged and left out", path, number)
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        logger.warning("%s: cannot be read and is left out (%s)", path, error)
        return {}
    return content if isinstance(content, dict) else {}


def _at(content: Any, *keys: str) -> dict[str, Any]:
    for key in keys:
        content = content.get(key) if isinstance(content, dict) else None
    return content if isinstance(content, dict) else {}


def finite(value: Any) -> float | int | None:
    """A number that JSON has, or None."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and math.isfinite(value) else None


def cut(value: Any) -> str:
    text = "" if value is None else str(value)
    return text if len(text) <= MAX_CHARS else f"{text[:MAX_CHARS]}… ({len(text):,} characters)"
