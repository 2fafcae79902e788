"""The front process of a run: starts the launcher under a guard, hands requests to stop to the ranks, returns one code.

    front (signals, lock, restarts) -> guard (own session) -> deepspeed -> per-node launcher -> ranks

The stock launcher does not do this: a SIGTERM to `deepspeed` leaves launcher and ranks running, and its per-node
launcher kills the ranks 30 s after its own SIGTERM, shorter than a step may take. So signals go to the ranks, past it.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.processes import adopt_orphans, catches, descendants, ranks_below, send
from launch.stop import StopRequests
from training.exit_codes import RESUMABLE

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.1
SSH_FAILED = 255
"""Of ssh itself, not of what ran on the other host. A rank that SIGHUP ended, through DeepSpeed's `sys.exit(-1)`, has
the same code; the ranks answer SIGHUP with a save, so on several hosts it is ssh's."""
KILLED = 128 + signal.SIGKILL
INTERRUPTED = 128 + signal.SIGINT


@dataclass(frozen=True)
class Outcome:
    """How a start ended: the ranks' exit code (128 + n for signal n) and whether somebody had asked to stop."""

    code: int
    was_stopped: bool


def supervise(
    command: Sequence[str],
    stops: StopRequests,
    *,
    environment: dict[str, str],
    grace_seconds: float = 600.0,
    lock_fd: int = -1,
    stop_file: Path | None = None,
    ranks_are_remote: bool = False,
) -> Outcome:
    """Run a launcher's command to its end.

    A request to stop goes once to every rank; ranks then have `grace_seconds` to finish the step and save. A second
    SIGINT, or the end of the grace, kills. Ranks on other hosts are reached by no signal: with `ranks_are_remote` the
    request is left as `stop_file`. Nothing of the run is alive on this host when this returns. `lock_fd` is kept open
    by the guard.
    """
    if not sys.platform.startswith("linux"):
        logger.warning("signals and orphans are looked after on Linux only; here the launcher runs as it is")
        return Outcome(_shell_code(subprocess.run(command, env=environment, check=False).returncode), False)
    adopt_orphans()
    not_ours = {process.pid for process in descendants(os.getpid()) if process.parent == os.getpid()}
    lifeline, our_end = os.pipe()
    guard = subprocess.Popen(
        [sys.executable, "-m", "launch.guard", str(lifeline), *command],
        env=environment,
        stdin=subprocess.DEVNULL,
        pass_fds=[lifeline, *([lock_fd] if lock_fd >= 0 else [])],
        start_new_session=True,  # a Ctrl-C at the terminal reaches this process only
    )
    os.close(lifeline)
    stopping = _Stopping(guard.pid, stops, grace_seconds, stop_file if ranks_are_remote else None)
    try:
        while guard.poll() is None and not stopping.must_kill():
            time.sleep(_POLL_SECONDS)
    finally:
        os.close(our_end)  # if the guard still runs, this is its order to kill
        guard.wait()
        if guard.returncode < 0:
            _kill_adopted(not_ours)
    code = stopping.code
    if code is None and ranks_are_remote and guard.returncode == SSH_FAILED:
        logger.error("a connection to a host broke, or could not be made: code %d of ssh", SSH_FAILED)
        code = SSH_FAILED
    elif code is None:
        code = _shell_code(guard.returncode)
    was_stopped = bool(stops.signum) or bool(stop_file and stop_file.exists())
    return Outcome(code, was_stopped)


class _Stopping:
    """From the first request to stop to the end of the ranks."""

    def __init__(self, guard_pid: int, stops: StopRequests, grace_seconds: float, stop_file: Path | None):
        self.guard_pid = guard_pid
        self.stops = stops
        self.grace_seconds = grace_seconds
        self.stop_file = stop_file
        self.code: int | None = None
        """The exit code when the run is killed here instead of ending by itself."""
        self._told = False

    def must_kill(self) -> bool:
        """Hand an open request on. True when the run is to be killed now; `code` then says with what result."""
        if not self.stops.signum:
            return False
        if self.stops.at_once:
            logger.warning("second Ctrl-C: killing the run; it continues from its last complete checkpoint")
            self.code = INTERRUPTED
        elif time.monotonic() - self.stops.requested_at > self.grace_seconds:
            logger.error("the ranks did not stop within %.0f s (--grace): killing them", self.grace_seconds)
            self.code = KILLED
        elif self.stop_file is not None:
            if not self.stop_file.exists():
                logger.warning("stopping: %s asks the ranks on all hosts to finish the step and save", self.stop_file)
                self.stop_file.touch()
        else:
            self._tell_ranks()
        return self.code is not None

    def _tell_ranks(self) -> None:
        if self._told:
            return
        ranks = ranks_below(self.guard_pid)
        if not ranks or not all(catches(rank, self.stops.signum) for rank in ranks):
            # Ranks install their handlers before anything worth saving exists, and a signal would only kill them.
            logger.warning("stopped while the ranks were still starting: they had nothing to save")
            self.code = RESUMABLE
            return
        name = signal.Signals(self.stops.signum).name
        logger.warning("stopping: %s to %d ranks, which finish the step and save; Ctrl-C kills", name, len(ranks))
        for rank in ranks:
            self._told |= send(rank, self.stops.signum)


def _shell_code(returncode: int) -> int:
    """128 + n for a process that signal n ended, whether reported as -n or, through `sys.exit(-n)`, as 256 - n."""
    if returncode < 0:
        return 128 - returncode
    return 128 + (256 - returncode) if returncode > 256 - signal.NSIG else returncode


def _kill_adopted(not_ours: set[int]) -> None:
    """The guard itself was killed: what it guarded has become our children. Kill until nothing is left."""
    while True:
        spared = not_ours | {process.pid for pid in not_ours for process in descendants(pid)}
        left = [process for process in descendants(os.getpid()) if process.pid not in spared]
        if not left:
            return
        for process in left:
            send(process, signal.SIGKILL)
        time.sleep(0.02)
        for process in left:
            try:
                os.waitpid(process.pid, os.WNOHANG)
            except ChildProcessError:
                continue
