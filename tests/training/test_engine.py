"""The ranks' groups and DeepSpeed's engine: what is waited for, and what must come out unchanged."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from training.config.settings import Config
from training.distributed.engine import _check_rotary, deepspeed_json
from training.errors import UserError


def test_rounded_rotary_frequencies_are_noticed():
    """DeepSpeed 0.18 makes a whole module bfloat16, buffers too."""
    module = nn.Module()
    module.rotary = nn.Module()
    module.rotary.register_buffer("inv_freq", torch.rand(4))
    _check_rotary(module)
    with pytest.raises(UserError, match=r"rotary\.inv_freq: expected float32 .* got torch\.bfloat16"):
        _check_rotary(module.bfloat16())


@pytest.mark.parametrize("size", [7, 8, 200_000_000])
def test_bucket_sizes_are_even_where_deepspeed_needs_it(size):
    config = Config()
    config.distributed.reduce_bucket_size = size
    zero = deepspeed_json(config.distributed, torch.device("cpu"), dtype="float32", max_grad_norm=1.0)[
        "zero_optimization"
    ]
    assert zero["allgather_bucket_size"] == size + size % 2
