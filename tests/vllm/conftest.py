"""Toy models as vLLM serves them, and the pictures they are asked about."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from pixelprune.settings import PruneSettings, ResizeSettings
from tests.vllm.engine import conversations_of, draw_images

SERVED = ResizeSettings(min_pixels=32 * 32, max_pixels=512 * 512)


@pytest.fixture(scope="session")
def served_folder(tmp_path_factory):
    """served_folder(family): a toy checkpoint whose answers vary, beside the settings it was trained with."""
    folders: dict[str, Path] = {}

    def make(family: str = "qwen3_vl") -> Path:
        if family not in folders:
            folders[family] = build_served_model(tmp_path_factory.mktemp(family) / "model", family)
        return folders[family]

    return make


def build_served_model(folder: Path, family: str) -> Path:
    from transformers import AutoModelForImageTextToText

    from training.composition.toy import build_toy_model

    build_toy_model(folder, family=family)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embed_tokens" not in name and "conv1d" not in name:
                parameter.mul_(3)
    model.save_pretrained(folder)
    write_settings(folder, PruneSettings(), SERVED)
    return folder


def write_settings(folder: Path, prune: PruneSettings, resize: ResizeSettings) -> None:
    settings = {"prune": dataclasses.asdict(prune), "resize": dataclasses.asdict(resize)}
    (folder / "pixelprune.json").write_text(json.dumps(settings))


@pytest.fixture(scope="session")
def stock_model():
    """stock_model(folder): the Hugging Face model, which generates to the full length."""
    from transformers import AutoModelForImageTextToText

    models: dict[Path, torch.nn.Module] = {}

    def load(folder: Path) -> torch.nn.Module:
        if folder not in models:
            models[folder] = AutoModelForImageTextToText.from_pretrained(folder).eval()
            models[folder].generation_config.eos_token_id = None
        return models[folder]

    return load


@pytest.fixture(scope="session")
def conversations(tmp_path_factory) -> dict[str, list[dict]]:
    return conversations_of(draw_images(tmp_path_factory.mktemp("images")))
