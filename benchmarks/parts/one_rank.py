"""Start a benchmark again as the only rank of its machine: the trainer does not run without a launcher's variables.

No launcher does it: torchrun would look up the host's own name, which fails where there is no DNS.
"""

import logging
import os
import subprocess
import sys

import torch
import torch.distributed as dist

from launch.local import free_port
from training.distributed.ranks import Ranks, join_ranks

ALONE = -1


def is_rank() -> bool:
    """Whether a launcher started this process."""
    return dist.get_node_local_rank(fallback_rank=ALONE) != ALONE


def run_as_rank(module: str, arguments: list[str]) -> int:
    """Run `python -m MODULE ARGUMENTS...` as one rank on this machine and return its exit code."""
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, env=os.environ | alone | address, check=False).returncode


def only_rank(module: str, device: str, threads: int) -> Ranks:
    """The one rank of `python -m MODULE`, on that device: a process without a launcher runs itself as one, and ends."""
    if not is_rank():
        sys.exit(run_as_rank(module, sys.argv[1:]))
    logging.disable(logging.WARNING)
    torch.set_num_threads(threads)
    ranks = join_ranks()
    if ranks.device.type != device:
        raise SystemExit(f"--device: this machine trains on {ranks.device.type}, not on {device}")
    return ranks
