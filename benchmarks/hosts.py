"""Two hosts for real: a run over ssh from a hostfile, its hosts, cable and front process lost in turn.

    python -m benchmarks.hosts

The hosts are network namespaces of this machine with an sshd each (`benchmarks.parts.two_hosts`: root, sshd and pdsh).
`python -m launch --hostfile` starts one rank on each through the real DeepSpeed runner and pdsh. What a run ends in
when something is lost is written down, and the run is then finished by two ranks on one host: its losses and weights
must be those of a run that nobody disturbed, bit for bit.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from benchmarks.parts.drill_runs import ROOT, DrillError, Run, has_equal_bits, prepare
from benchmarks.parts.record import markdown_table, write_record
from benchmarks.parts.two_hosts import ADDRESSES, DEVICE, NAMES, TwoHosts, enter_own_mounts, why_not
from training.checkpoint.files import complete_checkpoints
from training.tracking.tracker import read_metrics

TIMEOUT_MINUTES = 1.0
CUT_SECONDS = 60.0
LONG_TIMEOUT_MINUTES = 5.0
"""For the cable that is put back: collectives wait longer than it is out."""
STEP = 4
"""After this one something happens."""
PATIENCE_SECONDS = 900


@dataclass(frozen=True)
class Ending:
    """How a disturbed start ended: the front process's code, and how long until nothing of it ran on any host."""

    code: int
    seconds: float


class HostsRun(Run):
    """A run whose starts are on both hosts."""

    def __init__(self, folder: Path, name: str, hosts: TwoHosts, timeout_minutes: float):
        settings = ["distributed.threads_per_rank=1", f"distributed.timeout_minutes={timeout_minutes}"]
        super().__init__(folder, name, *settings)
        self.hosts = hosts
        self.hostfile = folder / "hostfile"
        self.hostfile.write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))

    def start_on_both(self) -> subprocess.Popen:
        command = [sys.executable, "-m", "launch", *self.arguments, "--hostfile", str(self.hostfile)]
        environment = os.environ | {"GLOO_SOCKET_IFNAME": DEVICE, "PYTHONPATH": str(ROOT)}
        with self.log.open("a") as log:
            return self.hosts.start(NAMES[0], command, cwd=ROOT, stdout=log, stderr=log, env=environment)

    def reaches(self, step: int, front: subprocess.Popen) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while max((row["step"] for row in read_metrics(self.folder)), default=0) < step:
            if front.poll() is not None or time.monotonic() > deadline:
                raise DrillError(f"{self.folder.name} does not reach step {step}; see {self.log}")
            time.sleep(0.05)

    def ends(self, front: subprocess.Popen, since: float) -> Ending:
        deadline = since + PATIENCE_SECONDS
        while front.poll() is None or any(self.hosts.processes(name) for name in NAMES):
            if time.monotonic() > deadline:
                left = {name: self.hosts.processes(name) for name in NAMES}
                raise DrillError(f"{self.folder.name} has not ended after {PATIENCE_SECONDS} s: {left}; see {self.log}")
            time.sleep(0.1)
        return Ending(front.returncode, time.monotonic() - since)


def undisturbed(run: HostsRun, front: subprocess.Popen) -> None:
    front.wait()


def host_killed(run: HostsRun, front: subprocess.Popen) -> None:
    run.hosts.kill_all(NAMES[1])


def cable_out_and_in(run: HostsRun, front: subprocess.Popen) -> None:
    run.hosts.cut()
    time.sleep(CUT_SECONDS)
    run.hosts.cut(again=True)


def cable_cut(run: HostsRun, front: subprocess.Popen) -> None:
    run.hosts.cut()


def front_killed(run: HostsRun, front: subprocess.Popen) -> None:
    front.send_signal(signal.SIGKILL)  # `ip netns exec` has become the front process


CASES: dict[str, Callable[[HostsRun, subprocess.Popen], None]] = {
    "nothing": undisturbed,
    "a host, for good": host_killed,
    f"the cable, {CUT_SECONDS:.0f} s": cable_out_and_in,
    "the cable, for good": cable_cut,
    "the front process": front_killed,
}
"""What is lost -> how."""


def drill(folder: Path, number: int, what: str, reference: Run) -> dict:
    """One case: a start on two hosts, the loss, its end, and two ranks on one host to the run's end."""
    scratch = Path(tempfile.mkdtemp(prefix="hosts-keys-"))
    with TwoHosts(scratch) as hosts:
        timeout = LONG_TIMEOUT_MINUTES if CASES[what] is cable_out_and_in else TIMEOUT_MINUTES
        run = HostsRun(folder, f"hosts-{number}", hosts, timeout)
        front = run.start_on_both()
        run.reaches(STEP, front)
        since = time.monotonic()
        CASES[what](run, front)
        ending = run.ends(front, since)
    saved = len(complete_checkpoints(run.folder / "checkpoints"))
    step = run.newest_step()
    done = max((row["step"] for row in read_metrics(run.folder)), default=0)
    if ending.code != 0:
        run.finish(2)
    return {
        "lost": what,
        "timeout, minutes": timeout,
        "exit code of the front process": ending.code,
        "seconds until nothing ran": round(ending.seconds, 1),
        "steps done again": done - step if saved else done,
        "equal bits": has_equal_bits(run, reference),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=list(CASES), default=list(CASES), help="what is lost")
    parser.add_argument("--keep", type=Path, help="keep the runs in this folder")
    parser.add_argument("--no-record", action="store_true")
    args, _ = parser.parse_known_args()
    if reason := why_not():
        print(f"benchmarks.hosts cannot run here: {reason}", file=sys.stderr)
        return 2
    enter_own_mounts("benchmarks.hosts")
    console = Console()
    folder = args.keep or Path(tempfile.mkdtemp(prefix="hosts-"))
    prepare(folder)
    reference = Run(folder, "reference", "distributed.threads_per_rank=1")
    reference.finish(2)
    rows = []
    for number, what in enumerate(args.only):
        rows.append(drill(folder, number, what, reference))
        console.print(rows[-1])
    table = markdown_table(rows)
    console.print(table)
    if not args.no_record:
        settings = {"timeout_minutes": TIMEOUT_MINUTES, "long_timeout_minutes": LONG_TIMEOUT_MINUTES}
        write_record("hosts", {"settings": settings, "rows": rows}, table)
    return 0 if all(row["equal bits"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
