"""The whole forward and loss on tensors that claim to be on a GPU: devices are checked, nothing is computed.

Needs a torch that was built for CUDA, and no GPU: `pytest -m cuda_build`. What a real GPU would find first, a tensor
made on the wrong device or a value that the host must wait for, is found here. Backward is not: the autograd engine
wants a real device.
"""

from __future__ import annotations

import dataclasses
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from pixelprune.images.patches import normalisation_table
from pixelprune.pack import Pack
from tests.training.test_host_sync import KNOWN, Syncs
from training.config.settings import ModelSettings
from training.diagnosis.steps import toy_pack
from training.loss.supervised import LossSettings
from training.model.attention import load_pretrained
from training.model.loading import enable_recomputation
from training.model.supervised import SupervisedModel

pytestmark = [
    pytest.mark.cuda_build,
    pytest.mark.skipif(torch.version.cuda is None, reason="this torch was built for CPUs"),
]


class Fakes:
    """Fake twins of real tensors, made outside of the mode and moved inside."""

    def __init__(self) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode
        from torch.fx.experimental.symbolic_shapes import ShapeEnv

        torch._C._ensureCUDADeviceGuardSet()
        self.mode = FakeTensorMode(shape_env=ShapeEnv())

    def of_pack(self, pack: Pack) -> Pack:
        tensors = {f.name: v for f in dataclasses.fields(pack) if isinstance(v := getattr(pack, f.name), torch.Tensor)}
        fakes = {name: self._twin(tensor) for name, tensor in tensors.items()}
        with self.mode:
            return dataclasses.replace(pack, **{name: fake.to("cuda") for name, fake in fakes.items()})

    def move(self, model: nn.Module) -> None:
        twins = {
            (id(module), name): self._twin(tensor)
            for module in model.modules()
            for name, tensor in (*module._parameters.items(), *module._buffers.items())
            if tensor is not None
        }
        with self.mode:
            for module in model.modules():
                for name in module._parameters:
                    if (id(module), name) in twins:
                        module._parameters[name] = nn.Parameter(twins[id(module), name].to("cuda"))
                for name in module._buffers:
                    if (id(module), name) in twins:
                        module._buffers[name] = twins[id(module), name].to("cuda")

    def _twin(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.mode.from_tensor(tensor.detach(), static_shapes=True)


@contextmanager
def fake_step(toy_folder, geometry):
    """The module and a pack, both on a GPU that is not there."""
    (pack,) = toy_pack(toy_folder)
    model: Any = load_pretrained(str(toy_folder), attention="varlen", dtype=torch.bfloat16).train()
    enable_recomputation(model, ModelSettings(recompute_vit=1, recompute_llm=1))
    normalisation_table.cache_clear()  # by device: a fake must not be found by others
    fakes = Fakes()
    fakes.move(model)
    moved = fakes.of_pack(pack)
    try:
        with fakes.mode:
            yield SupervisedModel(model, geometry, LossSettings()), moved
    finally:
        normalisation_table.cache_clear()


def test_forward_and_loss_stay_on_the_device_and_only_stock_code_waits(toy_folder, geometry, monkeypatch):
    with fake_step(toy_folder, geometry) as (module, pack):
        syncs = Syncs(monkeypatch)
        hidden = module.hidden_at_supervised(pack)
        with torch.no_grad():  # the head's chunks run their own backward
            total = module(pack).total
        syncs.undo()
    assert hidden.device.type == total.device.type == "cuda"
    assert hidden.shape[0] == pack.num_supervised
    # By function: the fakes' own code reads a list value by value, and a mask by its indices.
    assert {function for function, _ in syncs.places} <= {function for function, _ in KNOWN}
    assert syncs.places


@pytest.mark.parametrize("name", ["input_ids", "position_ids", "labels"])
def test_a_tensor_on_the_wrong_device_is_found(name, toy_folder, geometry):
    with fake_step(toy_folder, geometry) as (module, pack):
        stray = dataclasses.replace(pack, **{name: getattr(pack, name).to("cpu")})
        with torch.no_grad(), pytest.raises((RuntimeError, ValueError), match=r"device|cuda"):
            module(stray)
