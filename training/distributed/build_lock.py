"""The lock that torch puts on a build of DeepSpeed's extension, and who holds it."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger(__name__)

_OPERATOR = "deepspeed_shm_comm"
_STALE_AFTER_SECONDS = 120.0
"""A compile takes about half a minute; a lock this old, held by no process here, was left by a killed one."""


def build_lock() -> Path:
    """Where the lock is while somebody builds."""
    from torch.utils.cpp_extension import _get_build_directory

    return (Path(_get_build_directory(_OPERATOR, verbose=False)) / "lock").resolve()


def clear_stale_lock(*, wait_for_builder: bool = True) -> None:
    """Return once nobody holds the lock of DeepSpeed's extension; remove one that a killed process left behind.

    wait_for_builder: False for a rank, whose load waits for a process that builds by itself.

    Torch's lock is a file without an owner, and every later start would wait on it for ever and in silence. The
    process that made it keeps it open, so a lock that no process of this machine has open is stale, unless another
    machine shares the folder: such a lock is given two minutes.
    """
    lock = build_lock()
    has_told = False
    while True:
        with _one_at_a_time(lock):
            try:
                age = time.time() - lock.stat().st_mtime
            except FileNotFoundError:
                return
            owner = owner_of(lock)
            if owner is not None and not wait_for_builder:
                return
            if owner is None and age > _STALE_AFTER_SECONDS:
                logger.warning("removing a build lock left %.0f seconds ago by a killed process: %s", age, lock)
                lock.unlink(missing_ok=True)
                return
        if not has_told:
            who = f"process {owner} builds" if owner else "another machine builds, or a killed process left,"
            logger.warning("%s DeepSpeed's extension; waiting for its lock %s", who, lock)
            has_told = True
        time.sleep(0.5)


@contextlib.contextmanager
def _one_at_a_time(lock: Path) -> Iterator[None]:
    """Among ranks that look at once: where one removed a stale lock, the next could remove a builder's new one."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # a folder that is read-only, a file system without locks
            fcntl.flock(stack.enter_context(lock.with_name("looked_at.lock").open("wb")), fcntl.LOCK_EX)
        yield


def owner_of(path: Path) -> int | None:
    """A process of this machine that has `path` open, where the system tells (Linux)."""
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(descriptor) == str(path):
                return int(descriptor.parts[2])
        except OSError:  # closed, ended, or somebody else's
            continue
    return None
