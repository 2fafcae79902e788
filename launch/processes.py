"""The process tree as /proc tells it (Linux): descendants, which of them are ranks, which signals they catch.

Standard library only: the guard, which must start at once and never fail, stands on this.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True)
class Process:
    """A process; `start_time` (clock ticks since boot) tells it from a later one with the same pid."""

    pid: int
    parent: int
    start_time: int


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent dies, so that none can leave the tree."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def descendants(root: int) -> list[Process]:
    """All living descendants of a process; zombies, which are dead already, are left out."""
    children: dict[int, list[tuple[Process, bool]]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (found := _read_stat(int(entry.name))):
            children.setdefault(found[0].parent, []).append(found)
    result: list[Process] = []
    open_pids = [root]
    while open_pids:
        for process, is_zombie in children.get(open_pids.pop(), []):
            open_pids.append(process.pid)
            if not is_zombie:
                result.append(process)
    return result


def ranks_below(root: int) -> list[Process]:
    """The rank processes under a launcher: they have RANK in their environment and their parent has not.

    DeepSpeed's per-node launcher and torchrun both set it. Children of a rank (loader workers, trackers) inherit it;
    one that has outlived its rank and become a child of `root` is therefore no rank.
    """
    found = descendants(root)
    has_rank = {process.pid: _has_rank(process.pid) for process in found}
    return [p for p in found if has_rank[p.pid] and p.parent != root and not has_rank.get(p.parent, False)]


def catches(process: Process, signum: int) -> bool:
    """Whether the process has installed a handler for the signal. False when it has gone."""
    try:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return False
    mask = next((int(line.split()[1], 16) for line in lines if line.startswith("SigCgt:")), 0)
    return bool(mask >> (signum - 1) & 1)


def send(process: Process, signum: int) -> bool:
    """Signal a process if it is still the one that was found. False when it has gone."""
    now = _read_stat(process.pid)
    if now is None or now[0].start_time != process.start_time:
        return False
    try:
        os.kill(process.pid, signum)
    except ProcessLookupError:
        return False
    return True


def _has_rank(pid: int) -> bool:
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return False
    return any(entry.startswith(b"RANK=") for entry in environment.split(b"\0"))


def _read_stat(pid: int) -> tuple[Process, bool] | None:
    """The process and whether it is a zombie; None when it has gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The command name stands in parentheses and may hold spaces and parentheses itself.
    fields = text[text.rindex(")") + 2 :].split()
    return Process(pid, int(fields[1]), int(fields[19])), fields[0] in "ZX"
