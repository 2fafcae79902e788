"""Nothing in forward and backward makes the host wait for the device, except the places known in the stock model.

On a GPU each of these stalls the queue; here they are counted on the CPU, by what is called. The stock model's own are
listed by function, so that a new transformers release that adds one is noticed.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForImageTextToText

from pixelprune.pack import pack_samples
from tests.conftest import screen
from tests.pixelprune.reference import make_sample
from tests.ranks import ROOT
from training.config import ModelSettings
from training.loss import LossSettings
from training.model import SupervisedModel, enable_recomputation

READS = {
    torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu, torch.Tensor.nonzero, torch.nonzero,
    torch.Tensor.__bool__, torch.Tensor.__int__, torch.Tensor.__float__, torch.Tensor.__index__,
    torch.Tensor.masked_select, torch.masked_select, torch.Tensor.unique, torch.equal, torch.Tensor.equal,
    torch.repeat_interleave, torch.Tensor.repeat_interleave,
}  # fmt: skip
OURS = [ROOT / package for package in ("pixelprune", "training")]


class Syncs(TorchFunctionMode):
    """Counts calls that need values on the host, by the innermost function of this project or of transformers."""

    def __init__(self):
        super().__init__()
        self.places: Counter[tuple[str, str]] = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in READS and "output_size" not in kwargs:
            self._count(func.__name__)
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and _has_mask(args[1]):
            self._count("boolean mask")
        return func(*args, **kwargs)

    def _count(self, what: str) -> None:
        frame = sys._getframe(2)
        while frame and not _is_known(frame.f_code.co_filename):
            frame = frame.f_back
        file = Path(frame.f_code.co_filename) if frame else Path("elsewhere")
        file = file.relative_to(ROOT) if any(file.is_relative_to(ours) for ours in OURS) else Path(file.name)
        self.places[f"{file}:{frame.f_code.co_name if frame else ''}", what] += 1


def _is_known(path: str) -> bool:
    return any(Path(path).is_relative_to(ours) for ours in OURS) or "/transformers/" in path


def _has_mask(index) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, torch.Tensor) and part.dtype == torch.bool for part in parts)


@pytest.fixture
def measured(toy_folder, toy_tokenizer, geometry) -> Counter:
    model = AutoModelForImageTextToText.from_pretrained(toy_folder).train()
    enable_recomputation(model, ModelSettings(recompute_vit=1, recompute_llm=1))
    engine_module = SupervisedModel(model, geometry, LossSettings())
    samples = [
        make_sample(toy_tokenizer, [screen(3, 5), screen(2, 4, 1)], "Where?", "(5, 8)"),
        make_sample(toy_tokenizer, [], "Hi", "Ho"),
        make_sample(toy_tokenizer, [screen(4, 4, 2)], "And?", "(1, 2)"),
    ]
    pack = pack_samples(samples, geometry)
    with Syncs() as syncs:
        engine_module(pack).total.backward()
    return syncs.places


KNOWN = {
    # Splits of the packed vision row by image: sdpa alone, twice per block with recomputation (6 blocks in all).
    ("modeling_qwen3_vl.py:<listcomp>", "tolist"): 12,
    # Features cut by image.
    ("modeling_qwen3_vl.py:get_image_features", "tolist"): 1,
    # Placeholders and features are counted.
    ("import_utils.py:torch_compilable_check", "item"): 1,
    # Borders in the positions: sdpa alone.
    ("masking_utils.py:find_packed_sequence_indices", "__bool__"): 1,
    # DeepStack: read and written at the image positions, in three layers.
    ("modeling_qwen3_vl.py:_deepstack_process", "boolean mask"): 6,
}


def test_only_the_stock_models_own_places_wait(measured):
    assert dict(measured) == KNOWN


def test_a_hidden_one_is_found():
    mask = torch.tensor([True, False])
    with Syncs() as syncs:
        mask.sum().item()
        torch.ones(2)[mask]
        torch.ones(2)[mask] = 0
        torch.ones(2).repeat_interleave(torch.tensor([1, 1]), output_size=2)
    assert sorted(what for _, what in syncs.places) == ["boolean mask", "item"]
    assert sum(syncs.places.values()) == 3
