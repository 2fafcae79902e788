"""Start a recipe on this machine through the `deepspeed` launcher: one rank per GPU, or a few on the CPU."""

from __future__ import annotations

import shutil
import socket
import sys
from pathlib import Path

from launch.environment import chosen_gpus, has_accelerator, num_gpus, rank_environment
from launch.restart import RestartPolicy
from training.distributed.cores import usable_cores
from training.errors import UserError

TRAINER = "training.train"
QUIET = ("--log_level", "critical")
"""DeepSpeed's launchers say nothing: their lines would bury the run's own, and a stop on request is an error to them.
How a run ended is said by the front process."""


def default_num_ranks() -> int:
    """One rank per GPU; without a GPU two, so that the distributed path is the one that runs."""
    return num_gpus() or min(2, usable_cores())


def find_deepspeed() -> str:
    """Path of the `deepspeed` launcher: on PATH, or beside this Python. Raises UserError."""
    beside = Path(sys.executable).with_name("deepspeed")
    found = shutil.which("deepspeed") or (str(beside) if beside.exists() else None)
    if found is None:
        raise UserError(
            "no `deepspeed` on PATH; install the training extra (`make install`, or pip install 'pixelprune[train]') "
            "and activate its environment"
        )
    return found


def free_port() -> int:
    """A TCP port for the ranks to meet at, so that two runs on one machine do not collide."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def local_command(recipe: Path, overrides: list[str], num_ranks: int, *, port: int | None = None) -> list[str]:
    """The exact command that starts `num_ranks` processes of training.train on this machine. Raises UserError."""
    gpus = chosen_gpus(num_ranks)
    which = ["--include", f"localhost:{','.join(gpus)}"] if gpus else ["--num_accelerators", str(num_ranks)]
    port_arguments = ["--master_port", str(port)] if port else []
    return [find_deepspeed(), *QUIET, *which, *port_arguments, "--module", TRAINER, str(recipe), *overrides]


def run_local(
    recipe: Path,
    overrides: list[str],
    num_ranks: int | None = None,
    *,
    restarts: RestartPolicy | None = None,
    grace_seconds: float = 600.0,
) -> int:
    """Run to the end in the foreground and return the exit code (training/exit_codes.py). Raises UserError."""
    from launch.run import Launch, run_launch
    from training.config.recipe import load_recipe
    from training.distributed.build_lock import clear_stale_lock

    config = load_recipe(recipe, overrides)
    ranks = num_ranks or default_num_ranks()

    def command() -> list[str]:
        clear_stale_lock()  # at every start: the one before may have been killed as it loaded the extension
        return local_command(recipe, overrides, ranks, port=free_port())

    environment = rank_environment(ranks, config.distributed.threads_per_rank)
    if not has_accelerator():
        # DeepSpeed would look for one in each of its processes, and warn in each that there is none.
        environment.setdefault("DS_ACCELERATOR", "cpu")
    launch = Launch(
        config,
        command,
        environment,
        grace_seconds=grace_seconds,
    )
    return run_launch(launch, restarts or RestartPolicy())
