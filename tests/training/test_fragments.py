"""Where ZeRO keeps the trained weights, on two real ranks: saved under their own names, or refused before step 1."""

from __future__ import annotations

import pytest

from tests.ranks import run_ranks

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def layouts(tmp_path_factory) -> dict[str, dict]:
    return run_ranks("tests.training.layout_program", 2, tmp_path_factory.mktemp("layouts") / "out.json")


@pytest.mark.parametrize("kind", ["float32, stage 1", "float32, stage 2", "bfloat16, stage 2"])
def test_pieces_of_two_ranks_are_the_weights_before_and_after_a_step(layouts, kind):
    assert layouts[kind] == {"before": True, "adam_steps_before": 0, "after": True, "adam_steps_after": 1}


def test_an_optimizer_that_cannot_be_saved_is_refused(layouts):
    assert "got BF16_Optimizer" in layouts["bfloat16, stage 1"]["refused"]
    assert "set distributed.zero_stage=2" in layouts["bfloat16, stage 1"]["refused"]


def test_another_layout_is_refused(layouts):
    assert "trained weights lie where a checkpoint would look for them" in layouts["another layout"]["refused"]
