"""Runs on every rank of test_faults.py: the trainer itself, with one thing that goes wrong on the second rank."""

from __future__ import annotations

import errno
import os
import sys

import torch
import torch.distributed as dist

from training import checkpoint_files
from training.model import SupervisedModel
from training.train import main


def full_disk() -> None:
    """The tensors of the second step's checkpoint find no room, half-way through."""
    write = checkpoint_files.save_file

    def save_file(tensors, path, metadata):
        write(tensors, path, metadata=metadata)
        if dist.get_rank() == 1 and path.parent.name == "step-00000002" and "fragments" in path.name:
            os.truncate(path, 1000)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    checkpoint_files.save_file = save_file


def on_second_forward(change) -> None:
    """Let `change` have the loss sums of the second training forward of the second rank."""
    forward, count = SupervisedModel.forward, 0

    def changed(self, pack):
        nonlocal count
        sums = forward(self, pack)
        count += self.training
        return change(sums) if self.training and count == 2 and dist.get_rank() == 1 else sums

    SupervisedModel.forward = changed


def run_out_of_memory(sums):
    raise torch.OutOfMemoryError("tried to allocate 20 GiB")


FAULTS = {
    "full-disk": full_disk,
    "not-a-number": lambda: on_second_forward(lambda sums: sums._replace(total=sums.total * torch.nan)),
    "out-of-memory": lambda: on_second_forward(run_out_of_memory),
}

if __name__ == "__main__":
    fault = next(argument for argument in sys.argv if argument in FAULTS)
    FAULTS[fault]()
    sys.exit(main([argument for argument in sys.argv[1:] if argument != fault]))
