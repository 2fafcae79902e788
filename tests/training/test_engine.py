"""The ranks' groups and DeepSpeed's engine: what is waited for, and what must come out unchanged."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.ranks import run_ranks
from tests.training.patience_program import TIMEOUT_SECONDS
from training.config.settings import Config
from training.distributed.engine import _check_rotary, deepspeed_json
from training.errors import UserError


@pytest.mark.ranks
def test_a_rank_that_is_done_early_may_wait_for_longer_than_a_collective_may_hang(tmp_path):
    result = run_ranks("tests.training.patience_program", 2, tmp_path / "out.json")
    assert result["waited"] > TIMEOUT_SECONDS


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
    zero = deepspeed_json(config, torch.device("cpu"))["zero_optimization"]
    assert zero["allgather_bucket_size"] == size + size % 2
