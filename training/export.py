"""The trained model as a Hugging Face folder that `from_pretrained` loads, with the settings it was trained with."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

from transformers import PreTrainedModel

from pixelprune.settings import PruneSettings, ResizeSettings
from training.model import ModelFiles

PRUNE_FILE = "pixelprune.json"


def export_model(
    folder: Path, model: PreTrainedModel, files: ModelFiles, prune: PruneSettings, resize: ResizeSettings, facts: dict
) -> Path:
    """Write weights, tokenizer, preprocessor, prune and resize settings and a model card; complete or not at all.

    The folder is written beside its final place and renamed when it is whole.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    model.save_pretrained(partial)
    files.tokenizer.save_pretrained(partial)  # type: ignore[attr-defined]
    if files.preprocessor:
        (partial / "preprocessor_config.json").write_text(json.dumps(files.preprocessor, indent=2) + "\n")
    settings = {"prune": dataclasses.asdict(prune), "resize": dataclasses.asdict(resize)}
    (partial / PRUNE_FILE).write_text(json.dumps(settings, indent=2) + "\n")
    (partial / "README.md").write_text(_model_card(files, prune, facts))
    if folder.exists():
        old = folder.with_name(folder.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        partial.rename(folder)
        shutil.rmtree(old)
    else:
        partial.rename(folder)
    return folder


def read_prune_settings(folder: Path) -> tuple[PruneSettings, ResizeSettings] | None:
    """The settings a model folder was trained with; None for a folder that this project did not write."""
    path = folder / PRUNE_FILE
    if not path.exists():
        return None
    content = json.loads(path.read_text())
    return PruneSettings(**content["prune"]), ResizeSettings(**content["resize"])


def _model_card(files: ModelFiles, prune: PruneSettings, facts: dict) -> str:
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: image-text-to-text",
        "tags: [pixelprune]",
        "---",
        "",
        "# Fine-tuned with PixelPrune",
        "",
        f"Started from `{files.path}`. Blocks are omitted with strategy `{prune.strategy}`, metric `{prune.metric}`,",
        f"threshold {prune.threshold}; evaluate and serve with the settings in `{PRUNE_FILE}`.",
        "",
        "| fact | value |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in facts.items()),
    ]
    return "\n".join(lines) + "\n"
