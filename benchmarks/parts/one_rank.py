"""Start a benchmark again as the only rank of a launcher: the trainer does not run without one."""

import subprocess
import sys

import torch.distributed as dist

ALONE = -1


def is_rank() -> bool:
    """Whether a launcher started this process."""
    return dist.get_node_local_rank(fallback_rank=ALONE) != ALONE


def run_as_rank(module: str, arguments: list[str]) -> int:
    """Run `python -m MODULE ARGUMENTS...` as one rank on this machine and return its exit code."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1"]
    return subprocess.run([*launcher, "-m", module, *arguments], check=False).returncode
