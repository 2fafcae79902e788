"""Fused kernels: refused where they cannot run, in this model's instances only, and equal to stock layers."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from pixelprune.model_call import final_hidden
from pixelprune.pack import pack_samples
from tests.conftest import screen
from tests.pixelprune.reference import make_sample
from tests.ranks import ROOT
from training.errors import UserError
from training.model.fused import check_fused, put_in, use_fused

HAS_LIGER = importlib.util.find_spec("liger_kernel") is not None


def test_a_cpu_is_refused_in_one_line(toy_model):
    with pytest.raises(UserError, match=r"^model\.liger: the kernels need a GPU, this is cpu; set model\.liger=false$"):
        use_fused(toy_model, torch.device("cpu"))


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="package liger-kernel is not installed"):
        check_fused(torch.device("cuda"), "qwen3_vl")


def test_another_family_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(UserError, match="not of qwen3_5"):
        check_fused(torch.device("cuda"), "qwen3_5")


def test_every_layer_is_exchanged_in_this_model_alone(toy_model, toy_tokenizer, geometry):
    """With functions written from the definitions, as liger's are called; they count their calls."""
    calls = {"norm": 0, "silu": 0}

    def rms_norm(x, weight, eps, offset, casting_mode, in_place):
        calls["norm"] += 1
        assert (offset, casting_mode, in_place) == (0.0, "llama", False)
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight

    def silu_mul(gate, up):
        calls["silu"] += 1
        return gate * torch.sigmoid(gate) * up

    model = copy.deepcopy(toy_model)
    num_layers = model.config.text_config.num_hidden_layers
    assert put_in(model, rms_norm, silu_mul) == {"RMSNorm": 4 * num_layers + 1, "SwiGLU": num_layers}
    pack = pack_samples([make_sample(toy_tokenizer, [screen(3, 4)], "Where?", "(5, 8)")], geometry)
    with torch.no_grad():
        expected = final_hidden(toy_model, pack, geometry)
        assert calls == {"norm": 0, "silu": 0}, "the other model's layers were exchanged"
        torch.testing.assert_close(final_hidden(model, pack, geometry), expected, atol=1e-5, rtol=1e-5)
    assert calls == {"norm": 4 * num_layers + 1, "silu": num_layers}


@pytest.mark.cuda
@pytest.mark.skipif(not HAS_LIGER, reason="needs liger-kernel")
def test_the_kernels_equal_the_stock_layers():
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    x, weight = torch.randn(64, 256, device="cuda", requires_grad=True), torch.rand(256, device="cuda")
    fused = LigerRMSNormFunction.apply(x, weight, 1e-6, 0.0, "llama", False)
    stock = F.rms_norm(x, (256,), weight, 1e-6)
    torch.testing.assert_close(fused, stock, atol=1e-5, rtol=1e-5)
    (gradient,) = torch.autograd.grad(fused.square().sum(), x)
    (expected,) = torch.autograd.grad(stock.square().sum(), x)
    torch.testing.assert_close(gradient, expected, atol=1e-4, rtol=1e-4)
    gate, up = torch.randn(2, 64, 256, device="cuda")
    torch.testing.assert_close(LigerSiLUMulFunction.apply(gate, up), F.silu(gate) * up, atol=1e-5, rtol=1e-5)


@pytest.mark.triton
@pytest.mark.skipif(not HAS_LIGER, reason="needs triton and liger-kernel")
def test_the_kernels_equal_the_stock_layers_in_the_interpreter(toy_folder):
    """liger's own kernels in the whole toy model, forward and backward, without a GPU."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "tests/training/fused_program.py", str(toy_folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["hidden"] < 1e-5, found
    assert found["gradients"] < 1e-4, found
    assert found["compared"] > 50
