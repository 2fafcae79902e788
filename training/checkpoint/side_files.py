"""What lies beside the weights of an export: the source's processor files, with training's sizes, and a model card."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from pixelprune.model_folder import PREPROCESSOR_FILE, PRUNE_FILE, ModelFolder, is_hub_id, read_model_file
from pixelprune.selection.registry import is_in_time
from pixelprune.settings import ResizeSettings
from training.config.settings import Config

__all__ = ["model_card", "write_processor_files"]

PROCESSOR_FILE = "processor_config.json"
"""Where newer processors keep what PREPROCESSOR_FILE holds, under `image_processor`."""
COPIED = (
    "video_preprocessor_config.json", "chat_template.json", "vocab.json", "merges.txt", "added_tokens.json",
    "special_tokens_map.json", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE",
)  # fmt: skip
"""Files of a published model that stock loaders and converters read beside the tokenizer's own, and its license."""
LICENSE_KEYS = ("license", "license_name", "license_link")
_CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)/snapshots/\w+/?$")


def write_processor_files(folder: Path, files: ModelFolder, resize: ResizeSettings) -> None:
    """The processor files of the model trained from, as they are but for the size limits, which are training's.

    A stock loader resizes by them: with the source's it would show the model other sizes than it was trained on.
    """
    if files.preprocessor:
        _write_json(folder / PREPROCESSOR_FILE, _with_limits(files.preprocessor, resize))
    if stored := read_model_file(files.path, PROCESSOR_FILE):
        processor = json.loads(stored)
        if isinstance(processor.get("image_processor"), dict):
            processor["image_processor"] = _with_limits(processor["image_processor"], resize)
        _write_json(folder / PROCESSOR_FILE, processor)
    for name in COPIED:
        if not (folder / name).exists() and (content := read_model_file(files.path, name)) is not None:
            (folder / name).write_text(content)


def _with_limits(preprocessor: dict[str, Any], resize: ResizeSettings) -> dict[str, Any]:
    """min_pixels and max_pixels, which older files have, would override `size`."""
    kept = {key: value for key, value in preprocessor.items() if key not in ("min_pixels", "max_pixels")}
    return kept | {"size": {"shortest_edge": resize.min_pixels, "longest_edge": resize.max_pixels}}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def model_card(config: Config, files: ModelFolder, facts: dict[str, str]) -> str:
    """README.md of an export. It names the base model and its license, as far as the source says them."""
    prune = config.pruning
    data = ", ".join(f"`{Path(source.path).name}`" for source in config.data.sources)
    base, source_card = _hub_id(files.path), _front_matter(read_model_file(files.path, "README.md") or "")
    front = {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["pixelprune"],
        **({"base_model": base} if base else {}),
        **{key: source_card[key] for key in LICENSE_KEYS if source_card.get(key)},
    }
    named = str(source_card.get("license_name") or source_card.get("license") or "")
    lines = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---",
        "",
        "# Fine-tuned with PixelPrune",
        "",
        f"Started from `{base or Path(files.path).name}`, trained on {data}.",
        f"License of the base model: {named or 'not stated in the folder that training started from'}.",
        f"Blocks are omitted with strategy `{prune.strategy}`, metric `{prune.metric}`, threshold {prune.threshold}"
        + (f", {prune.direction} along the screenshots of a conversation;" if is_in_time(prune) else ";"),
        f"evaluate and serve with the settings in `{PRUNE_FILE}`.",
        "",
        "| fact | value |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in facts.items()),
    ]
    return "\n".join(lines) + "\n"


def _hub_id(path: str) -> str:
    """OWNER/NAME of a model that came from the hub, by its id or out of the hub's cache; "" for another folder."""
    if cached := _CACHED.search(path):
        return "/".join(cached.groups())
    return path if is_hub_id(path) else ""


def _front_matter(card: str) -> dict[str, Any]:
    """The YAML in front of a model card; {} where there is none that can be read."""
    found = re.match(r"---\s*\n(.*?)\n---", card, re.DOTALL)
    try:
        content = yaml.safe_load(found.group(1)) if found else None
    except yaml.YAMLError:
        content = None
    return content if isinstance(content, dict) else {}
