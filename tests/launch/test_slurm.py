"""The Slurm script, run by bash against stand-ins of Slurm's own commands."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from launch.__main__ import main

SRUN = """#!/bin/bash
# As srun: hands signals to its task, returns its code. The task's arguments are kept.
while [ "$1" != bash ]; do echo "$1" >> "$LOG.options"; shift; done
printf '%s\\n' "${@:5}" > "$LOG.front"
trap 'echo USR1 >> "$LOG.signals"; asked=1' USR1
touch "$LOG.started"
for _ in $(seq 400); do
  [ -n "$END_AT_ONCE" ] && exit "$END_AT_ONCE"
  [ -n "$asked" ] && { sleep 0.3; exit 85; }
  [ -e "$LOG.cancel" ] && exit 85
  sleep 0.05
done
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then printf 'node01\\nnode02\\n'; else echo "$@" >> "$LOG.scontrol"; fi
"""


@pytest.fixture(autouse=True)
def _unchecked(monkeypatch):
    monkeypatch.setattr(
        "launch.__main__._check", lambda *_, **__: 0
    )  # what a dry run looks at is tried in test_dry_run


@pytest.fixture
def job(tmp_path, capsys):
    def start(*arguments: str, **variables: str) -> subprocess.Popen:
        run = ["configs/debug.yaml", f"run.folder={tmp_path}", "schedule.max_steps=3"]
        assert main([*run, "--slurm", "--nodes", "2", "--gpus-per-node", "4", *arguments, "--dry-run"]) == 0
        script = tmp_path / "job.sbatch"
        script.write_text(capsys.readouterr().out)
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
            (tmp_path / name).write_text(text)
            (tmp_path / name).chmod(0o755)
        environment = os.environ | {
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "LOG": str(tmp_path / "log"),
            "SLURM_JOB_ID": "123456",
            "SLURM_JOB_NODELIST": "node[01-02]",
            "END_AT_ONCE": "",
        }
        return subprocess.Popen(["bash", str(script)], env=environment | variables)

    return start


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.02)


def test_script_asks_for_what_was_said(capsys):
    options = ["--partition", "gpu", "--time", "2:00:00", "--warning", "300", "--sbatch=--account=vision"]
    assert main(["configs/debug.yaml", "--slurm", "--nodes", "4", *options, "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for expected in (
        "--nodes=4",
        "--ntasks-per-node=1",
        "--gpus-per-node=8",
        "--partition=gpu",
        "--time=2:00:00",
        "--signal=B:USR1@300",
        "--requeue",
        "--account=vision",
    ):
        assert f"#SBATCH {expected}" in lines


def test_the_script_has_a_place_for_modules_containers_and_options_of_srun(job, tmp_path):
    setup = ["--setup", "module() { echo loaded $2; }", "--setup", "module load cuda"]
    container = ["--srun=--container-image=a b.sqsh", "--python", "/opt/bin/python3"]
    assert job(*setup, *container, END_AT_ONCE="0").wait(60) == 0
    assert "--container-image=a b.sqsh" in (tmp_path / "log.options").read_text().splitlines()
    assert (tmp_path / "log.front").read_text().splitlines()[0] == "/opt/bin/python3"
    assert (tmp_path / "debug" / "slurm-123456.log").read_text() == "loaded cuda\n", (
        "its folder is made, its log is there"
    )


def test_an_output_that_was_asked_for_is_left_alone(job, tmp_path):
    assert job("--sbatch=--output=mine.log", "--setup", "echo said", END_AT_ONCE="0").wait(60) == 0
    assert not list((tmp_path / "debug").glob("*.log"))


def test_every_node_starts_the_front_process_with_the_same_meeting_point(job, tmp_path):
    assert job(END_AT_ONCE="0").wait(60) == 0
    front = (tmp_path / "log.front").read_text().splitlines()
    assert front[1:4] == ["-m", "launch", "configs/debug.yaml"]
    assert "schedule.max_steps=3" in front
    hosts = tmp_path / "debug" / "hosts-123456"
    assert hosts.read_text() == "node01 slots=4\nnode02 slots=4\n"
    assert front[-4:] == ["--hostfile", str(hosts), "--master", f"node01:{20000 + 123456 % 20000}"]
    assert not (tmp_path / "log.scontrol").exists()
    assert (tmp_path / "debug" / "slurm-123456.log").exists()
    # Killed as they end with 85, the other nodes would make the step's code 137.
    assert {"--kill-on-bad-exit=0", "--wait=900"} <= set((tmp_path / "log.options").read_text().split())


def test_end_of_time_is_handed_on_and_the_job_goes_back_into_the_queue(job, tmp_path):
    script = job()
    wait_for(tmp_path / "log.started")
    script.send_signal(signal.SIGUSR1)
    assert script.wait(60) == 85
    assert (tmp_path / "log.signals").read_text() == "USR1\n"
    assert (tmp_path / "log.scontrol").read_text() == "requeue 123456\n"


def test_stop_that_did_not_come_from_the_time_limit_is_not_requeued(job, tmp_path):
    script = job()
    wait_for(tmp_path / "log.started")
    (tmp_path / "log.cancel").touch()
    assert script.wait(60) == 85
    assert not (tmp_path / "log.scontrol").exists()


@pytest.mark.parametrize(("code", "count", "requeued"), [("1", "0", True), ("1", "2", False), ("2", "0", False)])
def test_failed_job_is_requeued_as_often_as_allowed(job, tmp_path, code, count, requeued):
    assert job("--restarts", "2", END_AT_ONCE=code, SLURM_RESTART_COUNT=count).wait(60) == int(code)
    assert (tmp_path / "log.scontrol").exists() == requeued


def test_without_slurm_submitting_is_refused_in_one_line(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["configs/debug.yaml", "--slurm"]) == 2
    assert "no `sbatch` on PATH" in capsys.readouterr().err
