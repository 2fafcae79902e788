"""One launch of a run: lock its folder, keep a snapshot, supervise the launcher, start again where that helps."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from launch.front import Outcome, supervise
from launch.restart import RestartPolicy, furthest_logged_step, run_with_restarts
from launch.snapshot import save_snapshot
from launch.stop import StopRequests
from training.config.recipe import show
from training.config.settings import Config
from training.errors import side_write
from training.exit_codes import FINISHED, RESUMABLE, STOP_FILE, USER_ERROR
from training.loop.folder_lock import FolderLock

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Launch:
    """What is started."""

    config: Config
    make_command: Callable[[], list[str]]
    """Called for every start: a port that was free for the last one may be taken."""
    environment: dict[str, str]
    grace_seconds: float = 600.0
    """From a request to stop to killing ranks that have not stopped."""
    ranks_are_remote: bool = False
    owns_folder: bool = True
    """False on all nodes of a job but the first, which locks the folder for all."""


def run_launch(launch: Launch, restarts: RestartPolicy) -> int:
    """Run to the end; returns the ranks' exit code. Raises UserError when another run has the folder."""
    folder = Path(launch.config.run.folder) / launch.config.run.name
    stop_file = folder / STOP_FILE
    lock = FolderLock(folder)

    def start() -> Outcome:
        command = launch.make_command()
        if launch.owns_folder:
            stop_file.unlink(missing_ok=True)
            with side_write("the snapshot of code and recipe", go_on=launch.config.checkpoint.on_error == "continue"):
                snapshot = save_snapshot(folder, command, show(launch.config), checkout=Path(__file__).parent.parent)
                logger.info("snapshot of code and recipe: %s", snapshot)
        logger.info("starting the ranks; each loads torch, transformers and DeepSpeed before it speaks")
        return supervise(
            command,
            stops,
            environment=launch.environment,
            grace_seconds=launch.grace_seconds,
            lock_fd=lock.fd,
            stop_file=stop_file,
            ranks_are_remote=launch.ranks_are_remote,
        )

    with StopRequests() as stops:
        if launch.owns_folder:
            lock.acquire()
        try:
            code = run_with_restarts(start, restarts, stops, lambda: furthest_logged_step(folder))
            if code not in (FINISHED, USER_ERROR, RESUMABLE) and not stops.signum:
                logger.error(
                    "failed with code %d: what the ranks said stands above; %s is as they left it", code, folder
                )
            return code
        finally:
            lock.release()
