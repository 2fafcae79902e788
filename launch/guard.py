"""The guard: the process between the front process and the launcher, which leaves nothing behind.

`python -m launch.guard LIFELINE_FD COMMAND...` runs the command and exits with its code. It holds the reading end of a
pipe whose only writing end is in the front process. When the front process ends in any way, SIGKILL included, the
kernel closes that end, the guard reads end-of-file and kills every descendant.

Why a process and a pipe: a killed process cannot clean up, and PR_SET_PDEATHSIG would have to be set by each process on
the way to the ranks, two of which (DeepSpeed's runner and its per-node launcher) are not ours. Why the subreaper: when
a launcher in the middle dies, its ranks become children of the guard instead of leaving the tree.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time

from launch.processes import Process, adopt_orphans, descendants, ranks_below

_POLL_SECONDS = 0.2
_LEFTOVER_SECONDS = 10.0
"""Time that helpers of the ranks (a tracker's uploader) get to end by themselves after the launcher has ended."""
_GIVE_UP_SECONDS = 60.0
"""A process that SIGKILL has not ended by now hangs in the kernel (a dead driver or file system)."""


def main(arguments: list[str]) -> int:
    lifeline, command = int(arguments[0]), arguments[1:]
    adopt_orphans()
    # The guard ends with its command or its lifeline, not by a signal that was meant for the run. Ignoring is inherited
    # through exec: without it a SIGUSR1 to the whole group would kill DeepSpeed's launchers, which have no handler.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    launcher = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)

    ranks: set[Process] = set()
    while launcher.returncode is None:
        if select.select([lifeline], [], [], _POLL_SECONDS)[0]:
            _kill_everything()
            return 128 + signal.SIGKILL
        ranks |= set(ranks_below(os.getpid()))
        _reap(launcher)
    code = launcher.returncode
    orphans = ranks & {_as_was(p, ranks) for p in descendants(os.getpid())}
    if orphans and code == 0:
        # DeepSpeed's runner reports success when its per-node launcher is killed.
        sys.stderr.write(f"launch: the launcher ended before {len(orphans)} of its ranks; they are killed\n")
        code = 1
    elif not orphans:
        _wait_for_leftovers(lifeline)
    _kill_everything()
    return code if code >= 0 else 128 - code


def _as_was(process: Process, ranks: set[Process]) -> Process | None:
    """The rank as it was known before its parent died, or None."""
    return next((r for r in ranks if (r.pid, r.start_time) == (process.pid, process.start_time)), None)


def _reap(launcher: subprocess.Popen) -> None:
    """Collect every child that has ended; the launcher's status is kept, adopted ones are only buried."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        if pid == launcher.pid:
            launcher.returncode = os.waitstatus_to_exitcode(status)


def _wait_for_leftovers(lifeline: int) -> None:
    deadline = time.monotonic() + _LEFTOVER_SECONDS
    while descendants(os.getpid()) and time.monotonic() < deadline:
        if select.select([lifeline], [], [], _POLL_SECONDS)[0]:
            return
        _reap_all()


def _kill_everything() -> None:
    """Kill until nothing is left: a process may have forked while the list was made."""
    deadline = time.monotonic() + _GIVE_UP_SECONDS
    while left := descendants(os.getpid()):
        for process in left:
            try:
                os.kill(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if time.monotonic() > deadline:
            pids = ", ".join(str(process.pid) for process in left)
            sys.stderr.write(f"launch: SIGKILL does not end {pids}: they hang in the kernel; the machine needs care\n")
            return
        time.sleep(0.02)
        _reap_all()
    _reap_all()


def _reap_all() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
