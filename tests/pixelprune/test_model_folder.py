"""A model folder is opened in one way: its own code runs when asked for, and what is damaged is one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pixelprune.hf import prepare
from pixelprune.model_folder import ModelFolder
from pixelprune.prompter import Prompter
from pixelprune.records.chat import ChatEncoder
from pixelprune.records.collator import PixelPruneCollator
from pixelprune.records.prepare import PrepareSettings
from pixelprune.settings import PruneSettings, ResizeSettings
from training.config.settings import ConfigError, ModelSettings
from training.model.loading import load_model_files

CODE = """
from pathlib import Path
from transformers import Qwen3VLConfig

(Path({folder!r}) / "its-code-ran").touch()

class HouseConfig(Qwen3VLConfig):
    model_type = "house_vl"
"""

OPENERS = {
    "ModelFolder": lambda path, **trust: ModelFolder.open(path, **trust),
    "Prompter": lambda path, **trust: Prompter.load(path, **trust),
    "prepare": lambda path, **trust: prepare(path, [{"role": "user", "content": "Hi"}], **trust),
    "ChatEncoder": lambda path, **trust: ChatEncoder.from_folder(path, **trust),
    "PrepareSettings": lambda path, **trust: PrepareSettings(path, PruneSettings(), ResizeSettings(), **trust).build(),
    "training": lambda path, **trust: load_model_files(ModelSettings(path, **trust)),
    "collator": lambda path, **trust: PixelPruneCollator.from_pretrained(path, **trust),
}


@pytest.fixture
def folder(toy_folder, tmp_path) -> Path:
    return shutil.copytree(toy_folder, tmp_path / "model")


@pytest.mark.parametrize("opener", OPENERS)
def test_a_folders_own_code_runs_only_when_asked_for(opener, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "house_vl", "auto_map": {"AutoConfig": "configuration_house.HouseConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "configuration_house.py").write_text(CODE.format(folder=str(folder)))
    with pytest.raises(ValueError, match="trust_remote_code") as caught:
        OPENERS[opener](str(folder))
    assert "\n" not in str(caught.value)
    assert not (folder / "its-code-ran").exists()
    with pytest.raises(ValueError, match="'house_vl' is not supported"):  # asked for, it runs, whatever comes of it
        OPENERS[opener](str(folder), trust_remote_code=True)
    assert (folder / "its-code-ran").exists()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "preprocessor_config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("opener", ["training", "Prompter", "PrepareSettings"])
def test_a_damaged_file_is_one_line_that_names_the_folder(name, opener, folder):
    (folder / name).write_text("{ garbage")
    with pytest.raises(ValueError, match=str(folder)) as caught:
        OPENERS[opener](str(folder))
    assert "\n" not in str(caught.value)


def test_a_teachers_folder_is_named_by_its_own_setting(tmp_path):
    with pytest.raises(ConfigError, match=r"^kd\.path: no such model folder"):
        load_model_files(ModelSettings(str(tmp_path / "gone")), "kd.path")


def test_the_collator_normalises_as_the_models_own_processor(folder):
    preprocessor = json.loads((folder / "preprocessor_config.json").read_text())
    preprocessor |= {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    geometry = PixelPruneCollator.from_pretrained(str(folder)).geometry
    assert geometry.image_mean == (0.1, 0.2, 0.3)
    assert geometry.image_std == (0.4, 0.5, 0.6)
