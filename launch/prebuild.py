"""Build DeepSpeed's small extension once, at install, so that no first run compiles or hangs on a stale lock.

`python -m launch.prebuild` is part of `make install`; `clear_stale_lock` also runs before every start.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from pathlib import Path

logger = logging.getLogger(__name__)

_OPERATOR = "deepspeed_shm_comm"
_STALE_AFTER_SECONDS = 120.0
"""A compile takes about half a minute; a lock this old, held by no process here, was left by a killed one."""


def clear_stale_lock() -> None:
    """Return once nobody holds the lock of DeepSpeed's extension; remove one that a killed process left behind.

    Torch's lock is a file without an owner, and every later start would wait on it for ever and in silence. The
    process that made it keeps it open, so a lock that no process of this machine has open is stale, unless another
    machine shares the folder: such a lock is given two minutes.
    """
    from torch.utils.cpp_extension import _get_build_directory

    lock = (Path(_get_build_directory(_OPERATOR, verbose=False)) / "lock").resolve()
    has_told = False
    while True:
        try:
            age = time.time() - lock.stat().st_mtime
        except FileNotFoundError:
            return
        owner = _process_with_open(lock)
        if owner is None and age > _STALE_AFTER_SECONDS:
            logger.warning("removing a build lock left %.0f seconds ago by a killed process: %s", age, lock)
            lock.unlink(missing_ok=True)
            return
        if not has_told:
            who = f"process {owner} builds" if owner else "another machine builds, or a killed process left,"
            logger.warning("%s DeepSpeed's extension; waiting for its lock %s", who, lock)
            has_told = True
        time.sleep(0.5)


def _process_with_open(path: Path) -> int | None:
    """A process of this machine that has `path` open, where the system tells (Linux)."""
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(descriptor) == str(path):
                return int(descriptor.parts[2])
        except OSError:  # closed, ended, or somebody else's
            continue
    return None


def prebuild() -> None:
    """Compile (or find compiled) what DeepSpeed loads at the start of ranks on the CPU.

    On a GPU machine too, whose tests start such ranks; ranks on GPUs load nothing.
    """
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    clear_stale_lock()
    ShareMemCommBuilder().load(verbose=False)


def main() -> int:
    from pixelprune.command import plain_console
    from pixelprune.selection.kernels import compile_all

    console = plain_console()
    console.print("building DeepSpeed's extension and the selection kernels (once)")
    prebuild()
    compile_all()
    console.print("ready")
    return 0


if __name__ == "__main__":
    sys.exit(main())
