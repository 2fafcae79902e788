"""Drills of the front process: what reaches the ranks, what comes back, and that nothing is left over."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.local import find_deepspeed, free_port
from launch.processes import descendants, ranks_below
from training.exit_codes import RESUMABLE

HERE = Path(__file__).parent
PLAIN = [sys.executable, str(HERE / "plain_launcher.py")]
# `launch` and `training` are not installed: a script is given the checkout that `python -m` finds by itself.
FROM_CHECKOUT = os.environ | {"PYTHONPATH": str(HERE.parent.parent)}
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the front process needs Linux")


def deepspeed() -> list[str]:
    return [find_deepspeed(), "--num_accelerators", "2", "--master_port", str(free_port())]


class Drill:
    """A front process over two stand-in ranks."""

    def __init__(self, folder: Path, mode: str, launcher: list[str] = PLAIN, grace: float = 120):
        self.folder = folder
        command = [*launcher, str(HERE / "stand_in.py"), str(folder), mode]
        self.log = (folder / "log").open("w")
        self.front = subprocess.Popen(
            [sys.executable, str(HERE / "front_command.py"), str(folder), str(grace), *command],
            stdout=self.log,
            stderr=self.log,
            cwd=HERE.parent.parent,
            env=FROM_CHECKOUT,
        )

    def wait_for_ranks(self) -> Drill:
        wait_until(lambda: len(list(self.folder.glob("rank-*.ready"))) == 2, self.text)
        return self

    def ends_with(self, code: int) -> None:
        assert self.front.wait(timeout=90) == code, self.text()

    def text(self) -> str:
        return (self.folder / "log").read_text()

    def received(self) -> list[list[int]]:
        return [[int(s) for s in path.read_text().split()] for path in sorted(self.folder.glob("rank-*.signals"))]

    def left_over(self) -> list[int]:
        pids = [int(path.read_text()) for path in self.folder.glob("*.pid")]
        assert len(pids) == 4, "two ranks and their workers were expected to have started"
        return [pid for pid in pids if is_alive(pid)]


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def wait_until(holds: Callable[[], bool], explain: Callable[[], str] = str) -> None:
    deadline = time.monotonic() + 90
    while not holds():
        assert time.monotonic() < deadline, explain()
        time.sleep(0.05)


@pytest.mark.ranks
def test_stop_passes_deepspeed_reaches_each_rank_once_and_brings_its_code_back(tmp_path):
    drill = Drill(tmp_path, "run", deepspeed()).wait_for_ranks()
    drill.front.send_signal(signal.SIGTERM)
    drill.ends_with(RESUMABLE)
    assert drill.received() == [[signal.SIGTERM], [signal.SIGTERM]]
    assert drill.left_over() == []


@pytest.mark.ranks
def test_crash_of_one_rank_under_deepspeed_ends_the_other_and_its_code_is_passed_on(tmp_path):
    drill = Drill(tmp_path, "exit-3", deepspeed())
    drill.ends_with(3)
    assert drill.left_over() == []


def test_death_of_the_node_launcher_is_a_failure_and_leaves_nothing(tmp_path):
    # DeepSpeed's runner, too, reports success when its per-node launcher is killed.
    runner = ["bash", "-c", '"$@"; exit 0', "runner", *PLAIN]
    drill = Drill(tmp_path, "run", runner).wait_for_ranks()
    time.sleep(1)  # the guard looks for ranks five times a second
    rank = next(p for p in ranks_below(drill.front.pid))
    os.kill(rank.parent, signal.SIGKILL)
    drill.ends_with(1)
    assert "launcher ended before 2 of its ranks" in drill.text()
    assert drill.left_over() == []


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (signal.SIGINT, signal.SIGTERM),
        (signal.SIGUSR1, signal.SIGUSR1),
        (signal.SIGHUP, signal.SIGTERM),
    ],
)
def test_every_signal_of_a_stop_reaches_each_rank_once(tmp_path, sent, expected):
    drill = Drill(tmp_path, "run").wait_for_ranks()
    drill.front.send_signal(sent)
    drill.ends_with(RESUMABLE)
    assert drill.received() == [[expected], [expected]]
    assert not list(tmp_path.glob("worker-*.signalled"))
    assert drill.left_over() == []


def test_repeated_sigterm_is_one_request(tmp_path):
    drill = Drill(tmp_path, "run").wait_for_ranks()
    for _ in range(3):
        drill.front.send_signal(signal.SIGTERM)
        time.sleep(0.05)
    drill.ends_with(RESUMABLE)
    assert drill.received() == [[signal.SIGTERM], [signal.SIGTERM]]


def test_sigkill_of_the_front_process_leaves_nothing(tmp_path):
    drill = Drill(tmp_path, "deaf").wait_for_ranks()
    inside = [process.pid for process in descendants(drill.front.pid)]
    assert len(inside) >= 6  # guard, launcher, two ranks, two workers
    drill.front.kill()
    wait_until(lambda: not any(is_alive(pid) for pid in inside))
    assert drill.left_over() == []


def test_sigkill_of_the_guard_is_a_failure_and_leaves_nothing(tmp_path):
    drill = Drill(tmp_path, "deaf").wait_for_ranks()
    guard = next(p for p in descendants(drill.front.pid) if p.parent == drill.front.pid)
    os.kill(guard.pid, signal.SIGKILL)
    drill.ends_with(128 + signal.SIGKILL)
    assert drill.left_over() == []


def test_sigkill_of_the_whole_group_is_a_failure_and_leaves_nothing(tmp_path):
    drill = Drill(tmp_path, "deaf").wait_for_ranks()
    guard = next(p for p in descendants(drill.front.pid) if p.parent == drill.front.pid)
    os.killpg(guard.pid, signal.SIGKILL)  # the workers have a session of their own
    drill.ends_with(128 + signal.SIGKILL)
    assert drill.left_over() == []


def test_second_ctrl_c_kills_ranks_that_do_not_stop(tmp_path):
    drill = Drill(tmp_path, "deaf").wait_for_ranks()
    drill.front.send_signal(signal.SIGINT)
    wait_until(lambda: "finish the step and save" in drill.text())
    time.sleep(0.4)
    assert drill.front.poll() is None
    drill.front.send_signal(signal.SIGINT)
    drill.ends_with(128 + signal.SIGINT)
    assert drill.left_over() == []


def test_one_ctrl_c_that_arrives_twice_still_saves(tmp_path):
    drill = Drill(tmp_path, "run").wait_for_ranks()
    drill.front.send_signal(signal.SIGINT)
    time.sleep(0.02)
    drill.front.send_signal(signal.SIGINT)
    drill.ends_with(RESUMABLE)
    assert drill.received() == [[signal.SIGTERM], [signal.SIGTERM]]


def test_ranks_that_do_not_stop_are_killed_after_the_grace(tmp_path):
    drill = Drill(tmp_path, "deaf", grace=0.5).wait_for_ranks()
    drill.front.send_signal(signal.SIGTERM)
    drill.ends_with(128 + signal.SIGKILL)
    assert "--grace" in drill.text()
    assert drill.left_over() == []


def test_stop_before_the_ranks_listen_ends_at_once_and_may_be_restarted(tmp_path):
    drill = Drill(tmp_path, "no-handlers").wait_for_ranks()
    drill.front.send_signal(signal.SIGTERM)
    drill.ends_with(RESUMABLE)
    assert "still starting" in drill.text()
    assert drill.left_over() == []


def test_finished_run_is_zero_and_a_killed_rank_is_named_by_its_signal(tmp_path):
    first, second = tmp_path / "finish", tmp_path / "killed"
    first.mkdir()
    second.mkdir()
    Drill(first, "finish").ends_with(0)
    code = "import os, sys; sys.exit(-9)"  # how DeepSpeed's launcher passes on a rank that SIGKILL ended
    command = [sys.executable, HERE / "front_command.py", second, "9", sys.executable, "-c", code]
    front = subprocess.run(command, env=FROM_CHECKOUT, check=False)
    assert front.returncode == 128 + signal.SIGKILL


@pytest.mark.parametrize(("where", "expected"), [((), 128 + signal.SIGHUP), (("--remote",), 255)])
def test_the_code_of_a_broken_ssh_is_no_signal(tmp_path, where, expected):
    """255 on one host is how DeepSpeed passes on a rank that SIGHUP ended; with other hosts it is ssh's own."""
    code = "import sys; sys.exit(255)"
    command = [sys.executable, HERE / "front_command.py", *where, tmp_path, "9", sys.executable, "-c", code]
    front = subprocess.run(command, capture_output=True, text=True, env=FROM_CHECKOUT, check=False)
    assert front.returncode == expected
    assert ("a connection to a host broke" in front.stderr) == bool(where)


def test_folder_stays_locked_until_the_last_rank_is_dead(tmp_path):
    drill = Drill(tmp_path, "deaf").wait_for_ranks()
    guard = next(p for p in descendants(drill.front.pid) if p.parent == drill.front.pid)
    os.kill(guard.pid, signal.SIGSTOP)  # it cannot clean up yet
    drill.front.kill()
    drill.front.wait()
    second = [sys.executable, HERE / "front_command.py", tmp_path, "9", "true"]
    refused = subprocess.run(second, capture_output=True, text=True, check=False, env=FROM_CHECKOUT)
    assert refused.returncode != 0
    assert f"pid {drill.front.pid} on " in refused.stderr
    os.kill(guard.pid, signal.SIGCONT)
    wait_until(lambda: not is_alive(guard.pid))
    assert drill.left_over() == []
    assert subprocess.run(second, check=False, env=FROM_CHECKOUT).returncode == 0
