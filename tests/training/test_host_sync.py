"""Nothing in forward and backward makes the host wait for the device, except the places known in the stock model.

On a GPU each of these stalls the queue; here they are counted on the CPU, by what is called. The stock model's own are
listed by function, so that a new transformers release that adds one is noticed. DeepSpeed's are not seen here: with
overlap_comm it waits for the device at the end of every backward.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from pixelprune.pack import pack_samples
from tests.conftest import screen
from tests.pixelprune.reference import make_sample
from tests.ranks import ROOT
from training.config.settings import ModelSettings
from training.loss.supervised import LossSettings
from training.model.attention import load_pretrained
from training.model.loading import enable_recomputation
from training.model.supervised import SupervisedModel

METHODS = (
    "item", "tolist", "numpy", "cpu", "nonzero", "masked_select", "unique", "equal", "repeat_interleave",
    "__bool__", "__int__", "__float__", "__index__",
)  # fmt: skip
FUNCTIONS = ("nonzero", "masked_select", "unique", "equal", "repeat_interleave")
OURS = [ROOT / package for package in ("pixelprune", "training")]


class Syncs:
    """Counts calls that need values on the host, by the innermost function of this project or of transformers.

    Methods are replaced, not intercepted by a torch function mode: backward, which recomputes layers, runs without one.
    """

    def __init__(self, monkeypatch):
        self.places: Counter[tuple[str, str]] = Counter()
        self._monkeypatch, self._own = monkeypatch, set(vars(torch.Tensor))
        for owner, names in ((torch.Tensor, METHODS), (torch, FUNCTIONS)):
            for name in names:
                monkeypatch.setattr(owner, name, self._counting(getattr(owner, name), name))
        for name in ("__getitem__", "__setitem__"):
            monkeypatch.setattr(torch.Tensor, name, self._counting_masks(getattr(torch.Tensor, name)))

    def undo(self) -> None:
        """Put back the methods. What the class only inherits is taken away again: as its own, C code would call it
        for every tensor, and a 0-dim tensor would pass for a sequence."""
        self._monkeypatch.undo()
        for name in set(vars(torch.Tensor)) - self._own:
            delattr(torch.Tensor, name)

    def _counting(self, original, name: str):
        def counted(*args, **kwargs):
            if "output_size" not in kwargs:
                self._count(name)
            return original(*args, **kwargs)

        return counted

    def _counting_masks(self, original):
        def counted(tensor, index, *value):
            if _has_mask(index):
                self._count("boolean mask")
            return original(tensor, index, *value)

        return counted

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
def measured(toy_folder, toy_tokenizer, geometry, monkeypatch) -> Counter:
    model = load_pretrained(str(toy_folder), attention="sdpa", dtype=torch.float32).train()
    enable_recomputation(model, ModelSettings(recompute_vit=1, recompute_llm=1))
    engine_module = SupervisedModel(model, geometry, LossSettings())
    samples = [
        make_sample(toy_tokenizer, [screen(3, 5), screen(2, 4, 1)], "Where?", "(5, 8)"),
        make_sample(toy_tokenizer, [], "Hi", "Ho"),
        make_sample(toy_tokenizer, [screen(4, 4, 2)], "And?", "(1, 2)"),
    ]
    pack = pack_samples(samples, geometry)
    syncs = Syncs(monkeypatch)
    engine_module(pack).total.backward()
    syncs.undo()
    return syncs.places


KNOWN = {
    # Features cut by image.
    ("modeling_qwen3_vl.py:get_image_features", "tolist"): 1,
    # Placeholders and features are counted.
    ("modeling_qwen3_vl.py:get_placeholder_mask", "item"): 1,
    ("import_utils.py:torch_compilable_check", "item"): 1,
    # DeepStack: read and written at the image positions, in three layers.
    ("modeling_qwen3_vl.py:_deepstack_process", "boolean mask"): 6,
}


def test_only_the_stock_models_own_places_wait(measured):
    assert dict(measured) == KNOWN


def test_a_hidden_one_is_found(monkeypatch):
    mask = torch.tensor([True, False])
    syncs = Syncs(monkeypatch)
    mask.sum().item()
    torch.ones(2)[mask]
    torch.ones(2)[mask] = 0
    torch.ones(2)[0] = 1
    torch.ones(2).repeat_interleave(torch.tensor([1, 1]), output_size=2)
    syncs.undo()
    assert sorted(syncs.places.items()) == [(("elsewhere:", "boolean mask"), 2), (("elsewhere:", "item"), 1)]
