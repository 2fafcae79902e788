"""Build DeepSpeed's small extension once, at install, so that no first run compiles or hangs on a stale lock.

`python -m launch.prebuild` is part of `make install`; locks of killed builds are cleared before every start, too.
"""

from __future__ import annotations

import sys

from training.distributed.build_lock import clear_stale_lock


def prebuild() -> None:
    """Compile (or find compiled) what DeepSpeed loads at the start of ranks on the CPU.

    On a GPU machine too, whose tests start such ranks; ranks on GPUs load nothing.
    """
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    clear_stale_lock()
    ShareMemCommBuilder().load(verbose=False)


def main() -> int:
    import pixelprune.selection.kernels
    import pixelprune.sessions.kernels
    from pixelprune.command import plain_console

    console = plain_console()
    console.print("building DeepSpeed's extension for ranks on the CPU: a C++ compiler's half minute, once")
    prebuild()
    console.print("compiling the selection kernels: as long, once")
    pixelprune.selection.kernels.compile_all()
    pixelprune.sessions.kernels.compile_all()
    console.print("ready")
    return 0


if __name__ == "__main__":
    sys.exit(main())
