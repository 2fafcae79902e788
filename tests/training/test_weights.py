"""Weights that are not those of the model are refused by name; the stock loader draws what is missing at random."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from training.config.settings import ModelSettings
from training.errors import UserError
from training.model.loading import load_model

CPU = torch.device("cpu")
NAME = "model.language_model.layers.0.mlp.gate_proj.weight"


@pytest.fixture
def folder(toy_folder, tmp_path):
    return shutil.copytree(toy_folder, tmp_path / "model")


def load(folder, **more):
    settings = ModelSettings(path=str(folder), dtype="float32", **more)
    return load_model(settings, attention="sdpa", device=CPU)


def change(folder, how) -> None:
    weights = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    how(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def test_a_missing_tensor_is_refused(folder):
    change(folder, lambda weights: weights.pop(NAME))
    with pytest.raises(UserError, match=rf"1 tensors of the model are missing .*: {NAME};"):
        load(folder)


def test_tensors_left_over_are_refused_and_some_named(folder):
    change(folder, lambda weights: weights.update({f"model.more.{i}.weight": torch.ones(2) for i in range(7)}))
    with pytest.raises(
        UserError, match=r"7 tensors of its weights have no place .*model\.more\.0\.weight.* and 2 more;"
    ):
        load(folder)


def test_pickles_are_read_only_where_they_are_trusted(folder):
    weights = load_file(folder / "model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"found pytorch_model\.bin, a pickle, .*model\.allow_pickle=true"):
        load(folder)
    model = load(folder, allow_pickle=True)
    assert torch.equal(dict(model.named_parameters())[NAME], weights[NAME])


def test_a_folder_without_weights_is_refused(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="expected weights as safetensors, found none"):
        load(folder)
