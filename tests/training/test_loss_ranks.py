"""The chunked loss under real ZeRO-2 ranks, one of which has a pack without supervised positions."""

from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from tests.ranks import run_ranks
from tests.training.loss_program import LEARNING_RATE, NUM_SUPERVISED, POSITIONS, SmallModel, batch

pytestmark = pytest.mark.ranks


def test_zero_2_step_equals_one_big_batch(tmp_path: Path) -> None:
    trained = run_ranks("tests.training.loss_program", 2, tmp_path / "out.json")
    for head in ("tied", "untied"):
        check_against_one_big_batch(trained[head], tied=head == "tied")


def check_against_one_big_batch(trained: dict[str, list], tied: bool) -> None:
    model = SmallModel(tied)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    total = torch.zeros(())
    for micro_step, counts in enumerate(POSITIONS):
        for rank, count in enumerate(counts):
            ids, labels = batch(micro_step, rank)
            logits = model.lm_head(model.hidden(ids))
            total = total + cross_entropy(logits[len(ids) - count :], labels, reduction="sum")
    (total / NUM_SUPERVISED).backward()
    torch.optim.SGD(model.parameters(), lr=LEARNING_RATE).step()

    assert sorted(trained) == sorted(before)
    for name, weight in model.named_parameters():
        assert (weight - before[name]).abs().max() > 1e-3  # a step was made
        torch.testing.assert_close(torch.tensor(trained[name]), weight.detach(), rtol=1e-5, atol=1e-6)
