"""The published sizes that benchmarks build from random weights."""

from __future__ import annotations

import pytest
import torch

from benchmarks.parts.shapes import random_model, shape_config


@pytest.mark.parametrize(("name", "billions"), [("2b", 2.13), ("4b", 4.44), ("8b", 8.77)])
def test_parameter_counts_are_those_of_the_published_checkpoints(name, billions):
    model = random_model(name, device=torch.device("meta"), dtype=torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.005)
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_unknown_shapes_are_refused():
    with pytest.raises(ValueError, match="one of the shapes toy, small, 2b, 4b, 8b, got '3b'"):
        shape_config("3b")
