"""How many CPU cores this process may use, and how many threads a rank computes with."""

from __future__ import annotations

import math
import os
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """Cores that the scheduler's binding and the container's quota leave to this process; at least 1.

    `os.cpu_count` says what the machine has: a job with 4 of 64 cores would start 64 threads that wait for each other.
    """
    cores, quota = len(usable_core_numbers()), _quota(_CGROUP)
    return cores if quota == math.inf else max(1, min(cores, math.ceil(quota)))


def usable_core_numbers() -> frozenset[int]:
    """The cores that this process is bound to; all of the machine where the system cannot say."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def _quota(cgroup: Path) -> float:
    """Seconds of CPU per second that a container gets (`docker --cpus`), control groups 2 or 1; inf without a limit."""
    newer, older = cgroup / "cpu.max", cgroup / "cpu"
    if newer.exists():
        quota, period = newer.read_text().split()
    elif (older / "cpu.cfs_quota_us").exists():
        quota, period = ((older / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
    else:
        return math.inf
    return math.inf if quota in ("max", "-1") else int(quota) / int(period)


def use_threads(asked: int, share: int) -> int:
    """Set and return the CPU threads of a rank: `asked` (the recipe's), else the user's, else `share`.

    The user's is OMP_NUM_THREADS, which torch read at its start and reports. `python -m launch` sets it for its ranks;
    other launchers may not, and every rank would take all cores.
    """
    import torch  # not at the start: the launcher asks for cores alone

    if asked or not _are_set_by_the_user(torch.__config__.parallel_info()):
        torch.set_num_threads(asked or share)
    return torch.get_num_threads()


def _are_set_by_the_user(report: str) -> bool:
    """As torch reports it: this package reads no environment of its own."""
    return "OMP_NUM_THREADS : " in report and "OMP_NUM_THREADS : [not set]" not in report
