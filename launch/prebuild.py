"""Build DeepSpeed's small extension once, at install, so that no first run compiles or hangs on a stale lock.

`python -m launch.prebuild` is part of `make install`; `clear_stale_lock` also runs before every start.
"""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path

logger = logging.getLogger(__name__)

_OPERATOR = "deepspeed_shm_comm"
_STALE_AFTER_SECONDS = 300.0
"""A compile takes under a minute; a lock this old was left by a killed process."""


def clear_stale_lock() -> None:
    """Remove the build lock that a killed process left behind: the next start would wait on it for ever."""
    from torch.utils.cpp_extension import _get_build_directory

    lock = Path(_get_build_directory(_OPERATOR, verbose=False)) / "lock"
    try:
        age = time.time() - lock.stat().st_mtime
    except FileNotFoundError:
        return
    if age > _STALE_AFTER_SECONDS:
        logger.warning("removing a build lock left %.0f minutes ago by a killed process: %s", age / 60, lock)
        lock.unlink(missing_ok=True)


def prebuild() -> None:
    """Compile (or find compiled) what this accelerator's DeepSpeed loads at start."""
    from deepspeed.accelerator import get_accelerator

    clear_stale_lock()
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        accelerator.create_op_builder("ShareMemCommBuilder").load(verbose=False)


def main() -> int:
    from rich.console import Console

    from pixelprune.kernels import compile_all

    console = Console(highlight=False)
    console.print("building DeepSpeed's extension and the selection kernels (once)")
    prebuild()
    compile_all()
    console.print("ready")
    return 0


if __name__ == "__main__":
    sys.exit(main())
