"""Runs on every rank of test_faults.py: the trainer itself, with one thing that goes wrong on the second rank."""

from __future__ import annotations

import atexit
import errno
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from training.checkpoint import files as checkpoint_files
from training.command import set_up_logging
from training.data.index import Index
from training.evaluation import during_training as grounding_eval
from training.exit_codes import leave_process
from training.model.supervised import SupervisedModel
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


def no_room_for_papers() -> None:
    """From the end of the index on no file grows by a byte, on any rank: a full disk, as the system itself says it."""
    checked = Index.checked

    def changed(*arguments, **options):
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        return checked(*arguments, **options)

    Index.checked = changed


def slow_disk() -> None:
    """A stop is asked of the second rank in its second step; the first rank's part of that save takes long.

    What is complete when the second rank leaves goes to `second-rank-saw.json` in the run's folder.
    """
    write = checkpoint_files.save_file

    def save_file(tensors, path, metadata):
        if "fragments" in path.name:
            if dist.get_rank() == 0:
                time.sleep(5)
            else:
                atexit.register(note, path.parent.parent)
        write(tensors, path, metadata=metadata)

    def note(root: Path) -> None:
        seen = [folder.name for folder in checkpoint_files.complete_checkpoints(root)]
        (root.parent / "second-rank-saw.json").write_text(json.dumps(seen))

    checkpoint_files.save_file = save_file
    on_forward(2, ask_to_stop)


def stop_in_validation() -> None:
    """The second rank is asked to stop as its first held-out pack has been through the model."""
    set_up_logging()
    forward = SupervisedModel.forward

    def changed(self, pack):
        sums = forward(self, pack)
        return ask_to_stop(sums) if dist.get_rank() == 1 and not self.training else sums

    SupervisedModel.forward = changed


def stop_in_answers() -> None:
    """The second rank is asked to stop while it generates answers to the held-out records."""
    set_up_logging()
    predict = grounding_eval.predict

    def changed(*arguments):
        for batch in predict(*arguments):
            if dist.get_rank() == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    grounding_eval.predict = changed


def ask_to_stop(sums):
    os.kill(os.getpid(), signal.SIGTERM)
    return sums


def make_nan(sums):
    return sums._replace(total=sums.total * torch.nan)


def on_forward(number: int, change) -> None:
    """Let `change` have the loss sums of that training forward of the second rank."""
    forward, count = SupervisedModel.forward, 0

    def changed(self, pack):
        nonlocal count
        sums = forward(self, pack)
        count += self.training
        return change(sums) if self.training and count == number and dist.get_rank() == 1 else sums

    SupervisedModel.forward = changed


def run_out_of_memory(sums):
    raise torch.OutOfMemoryError("tried to allocate 20 GiB")


FAULTS = {
    "full-disk": full_disk,
    "no-room": no_room_for_papers,
    "slow-disk": slow_disk,
    "not-a-number": lambda: on_forward(2, make_nan),
    "not-a-number-at-first": lambda: on_forward(1, make_nan),
    "stop-in-validation": stop_in_validation,
    "stop-in-answers": stop_in_answers,
    "out-of-memory": lambda: on_forward(2, run_out_of_memory),
}

if __name__ == "__main__":
    fault = next(argument for argument in sys.argv if argument in FAULTS)
    FAULTS[fault]()
    leave_process(main([argument for argument in sys.argv[1:] if argument != fault]))
