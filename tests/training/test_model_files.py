"""What a model folder must hold to be trained, and what is written of it."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from training.composition.toy import build_toy_model
from training.config.settings import ConfigError, ModelSettings
from training.config.teacher import TeacherSettings
from training.data.settings import SourceSettings
from training.distributed.ranks import Ranks
from training.errors import UserError
from training.evaluation.inputs import model_of
from training.loop import feed
from training.model import loading
from training.model.loading import load_model, load_model_files, load_model_files_once
from training.teacher import files


def test_a_model_folder_without_its_tokenizer_is_not_the_datas_fault(toy_folder, tmp_path):
    """transformers makes a tokenizer of one token out of it, in silence."""
    folder = shutil.copytree(toy_folder, tmp_path / "model")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ConfigError, match=r"model\.path: .* its tokenizer has . tokens and no image token"):
        load_model_files(ModelSettings(path=str(folder)))


def test_an_unknown_family_is_named(toy_folder, tmp_path):
    folder = shutil.copytree(toy_folder, tmp_path / "model")
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2_vl"}))
    with pytest.raises(ConfigError, match=r"model\.path: model type 'qwen2_vl' is not supported"):
        load_model_files(ModelSettings(path=str(folder)))


@pytest.mark.parametrize("layers", [0, 1])
def test_layers_that_are_not_loaded_are_not_announced(layers, tmp_path):
    """Qwen3.5 is published with layers for multi-token prediction, which the stock model leaves out."""
    folder = build_toy_model(tmp_path / "model", family="qwen3_5")
    content = json.loads((folder / "config.json").read_text())
    content["text_config"]["mtp_num_hidden_layers"] = layers
    (folder / "config.json").write_text(json.dumps(content))
    settings = ModelSettings(path=str(folder), dtype="float32")
    load_model(settings, attention="sdpa", device=torch.device("cpu")).save_pretrained(tmp_path / "out")
    text = json.loads((tmp_path / "out" / "config.json").read_text())["text_config"]
    assert text["mtp_num_hidden_layers"] == 0


def test_quantised_weights_are_refused(toy_folder, tmp_path):
    folder = shutil.copytree(toy_folder, tmp_path / "model")
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(ConfigError, match="holds quantised weights"):
        load_model(ModelSettings(path=str(folder)), attention="sdpa", device=torch.device("cpu"))


@pytest.mark.parametrize("path", ["runs/no/export", "./model", "model", "~/model", "/nowhere/model"])
def test_a_path_that_is_not_there_asks_no_network(path, monkeypatch):
    monkeypatch.setattr(loading.ModelFolder, "open", lambda *_, **__: pytest.fail("asked"))
    with pytest.raises(ConfigError, match=f"model.path: no such model folder: {path}"):
        load_model_files(ModelSettings(path=path))


def test_one_rank_asks_the_hub_before_the_others_do(monkeypatch):
    """The others of a machine find in the cache what the first one brought, or hear its error."""
    asked: list[int] = []
    monkeypatch.setattr(loading, "load_model_files", lambda *_: asked.append(1))
    first, other = (Ranks(rank, 1, rank, torch.device("cpu")) for rank in (0, 1))
    monkeypatch.setattr(Ranks, "from_first", lambda self, do: do() if self.is_first else None)
    for ranks, path, times in ((first, "OWNER/NAME", 2), (other, "OWNER/NAME", 1), (first, "/a/folder", 1)):
        asked.clear()
        load_model_files_once(ModelSettings(path=path), ranks)
        assert len(asked) == times, path


def test_one_rank_asks_for_the_teacher_and_for_data_of_the_hub(monkeypatch):
    asked: list[str] = []
    monkeypatch.setattr(files, "load_model_files_once", lambda settings, ranks, key: asked.append(f"{key} by {ranks}"))
    student = SimpleNamespace(path="me/student")
    with pytest.raises(AttributeError):  # the comparison with the student, of which there is nothing here
        files.load_teacher_files(TeacherSettings(path="me/teacher"), ModelSettings(path="x"), student, "all ranks")
    assert asked == ["kd.path by all ranks"]
    asked.clear()
    monkeypatch.setattr(feed, "open_source", lambda source, index_dir: asked.append(source.path))
    sources = [SourceSettings("hf://datasets/me/data"), SourceSettings("data/train.jsonl")]
    first, other = (Ranks(rank, 1, rank, torch.device("cpu")) for rank in (0, 1))
    monkeypatch.setattr(Ranks, "from_first", lambda self, do: do() if self.is_first else None)
    for ranks, expected in ((first, ["hf://datasets/me/data"]), (other, [])):
        asked.clear()
        feed.ask_hub_once(sources, "", ranks)
        assert asked == expected


def test_a_run_stands_for_its_export(tmp_path):
    assert model_of("OWNER/NAME") == "OWNER/NAME"
    (tmp_path / "config.yaml").touch()
    with pytest.raises(UserError, match=r"has no export yet; .*training\.export"):
        model_of(str(tmp_path))
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "config.json").touch()
    assert model_of(str(tmp_path)) == str(tmp_path / "export")
    assert model_of(str(tmp_path / "export")) == str(tmp_path / "export")
