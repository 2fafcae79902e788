"""Runs on every rank of test_loss_ranks.py: one ZeRO-2 step of a small model whose loss is `supervised_loss`."""

import json
import sys
from pathlib import Path

import deepspeed
import torch
from torch import Tensor, nn

from tests.ranks import without_launcher_arguments
from training.distributed.ranks import join_ranks, leave_ranks
from training.exit_codes import leave_process
from training.loss.supervised import LossSettings, LossSums, supervised_loss

VOCAB, WIDTH, LEARNING_RATE = 23, 8, 0.5
POSITIONS = ((5, 0), (3, 7))
"""Supervised positions of [micro-step][rank]: rank 1 starts with a pack that holds none."""
NUM_SUPERVISED = sum(map(sum, POSITIONS))


class SmallModel(nn.Module):
    """Embedding, one layer, output head; seeded."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)
        if tied:
            self.lm_head.weight = self.embedding.weight

    def hidden(self, ids: Tensor) -> Tensor:
        return self.layer(self.embedding(ids)).tanh()

    def forward(self, ids: Tensor, labels: Tensor) -> LossSums:
        # As in training: the whole row goes through the model, the loss takes its supervised positions (the last).
        hidden = self.hidden(ids)
        return supervised_loss(hidden[len(ids) - len(labels) :], self.lm_head, labels, LossSettings(chunk_size=2))


def batch(micro_step: int, rank: int) -> tuple[Tensor, Tensor]:
    """Row of 9 token ids and the labels of its last positions."""
    generator = torch.Generator().manual_seed(10 * micro_step + rank)
    tokens = torch.randint(VOCAB, (2, 9), generator=generator)
    return tokens[0], tokens[1, : POSITIONS[micro_step][rank]]


def train_one_step(tied: bool) -> dict[str, list]:
    """Weights by name after one optimizer step of all ranks' micro-steps."""
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    model = SmallModel(tied)
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 2, "overlap_comm": False},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # absent, it would be 1
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    for micro_step in range(len(POSITIONS)):
        engine.set_gradient_accumulation_boundary(micro_step == len(POSITIONS) - 1)
        sums = engine(*batch(micro_step, rank))
        engine.backward(sums.total * (world_size / NUM_SUPERVISED), scale_wrt_gas=False)
        engine.step()
    return {name: weight.tolist() for name, weight in model.named_parameters()}


def main() -> None:
    (out,) = without_launcher_arguments(sys.argv[1:])
    torch.set_num_threads(1)
    join_ranks()
    trained = {head: train_one_step(tied=head == "tied") for head in ("tied", "untied")}
    if torch.distributed.get_rank() == 0:
        Path(out).write_text(json.dumps(trained))
    leave_ranks()
    leave_process(0)


if __name__ == "__main__":
    main()
