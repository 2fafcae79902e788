"""Waiting for other ranks."""

from __future__ import annotations

import pytest

from tests.ranks import run_ranks
from tests.training.patience_program import TIMEOUT_SECONDS


@pytest.mark.ranks
def test_a_rank_that_is_done_early_may_wait_for_longer_than_a_collective_may_hang(tmp_path):
    result = run_ranks("tests.training.patience_program", 2, tmp_path / "out.json")
    assert result["waited"] > TIMEOUT_SECONDS
