"""Toy models as vLLM serves them, and the pictures they are asked about."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from pixelprune.family import EXPERTS_INPUTS_FIRST, FAMILIES, published_layout
from pixelprune.settings import PruneSettings, ResizeSettings
from tests.vllm.engine import ROOT, conversations_of, draw_images, draw_unusual_images, user

LINEAR_HEADS = {"linear_key_head_dim": 128, "linear_value_head_dim": 128}
"""Of published size: vLLM's kernels for delta nets on a CPU take no smaller ones."""
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

    sizes = LINEAR_HEADS if FAMILIES[family].linear_attention else None
    toy_builder().build_toy_model(folder, family=family, text_sizes=sizes)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embed_tokens" not in name and "conv1d" not in name:
                parameter.mul_(3)
    weights = published_layout(family, dict(model.state_dict()))
    model.save_pretrained(folder, state_dict=weights, save_original_format=family not in EXPERTS_INPUTS_FIRST)
    write_settings(folder, PruneSettings(), SERVED)
    return folder


def toy_builder() -> ModuleType:
    """`training/composition/toy.py` by its path: vLLM's environment has no training stack, and it needs none."""
    spec = importlib.util.spec_from_file_location("toy", ROOT / "training" / "composition" / "toy.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_settings(folder: Path, prune: PruneSettings, resize: ResizeSettings) -> None:
    settings = {"prune": dataclasses.asdict(prune), "resize": dataclasses.asdict(resize)}
    (folder / "pixelprune.json").write_text(json.dumps(settings))


@pytest.fixture(scope="session")
def stock_model():
    """stock_model(folder, dtype): the Hugging Face model, which generates to the full length."""
    from transformers import AutoModelForImageTextToText

    models: dict[tuple, torch.nn.Module] = {}

    def load(folder: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
        if (folder, dtype) not in models:
            models[folder, dtype] = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).eval()
            models[folder, dtype].generation_config.eos_token_id = None
        return models[folder, dtype]

    return load


@pytest.fixture(scope="session")
def conversations(tmp_path_factory) -> dict[str, list[dict]]:
    return conversations_of(draw_images(tmp_path_factory.mktemp("images")))


@pytest.fixture(scope="session")
def unusual(tmp_path_factory) -> dict[str, list[dict]]:
    """A question about each picture in another mode than RGB."""
    drawn = draw_unusual_images(tmp_path_factory.mktemp("unusual"))
    return {name: [user("Where is it?", path)] for name, path in drawn.items()}
