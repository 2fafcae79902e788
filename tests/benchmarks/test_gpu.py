"""The GPU record's steps: none stops the rest, and what is cut off says so and leaves nothing running."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from benchmarks.gpu import steps_for
from benchmarks.parts.limited_steps import LimitedStep, run_steps
from tests.ranks import ROOT


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def has_ended(pid: int) -> bool:
    """Gone, or only waiting for somebody to ask how it ended."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


STARTS_ANOTHER = """
import pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
pathlib.Path({path!r}).write_text(str(child.pid))
print("working", flush=True)
time.sleep(600)
"""


def test_failing_and_endless_steps_do_not_stop_the_rest(tmp_path):
    pid = tmp_path / "pid"
    steps = [
        LimitedStep("good", 60, python("print('first'); print('done | well')")),
        LimitedStep("bad", 60, python("print('started', flush=True); raise SystemExit('no such kernel')")),
        LimitedStep("endless", 10, python(STARTS_ANOTHER.format(path=str(pid)))),
        LimitedStep("silent", 60, python("print('| a | row |')"), "silent.md"),
    ]
    seen: list[list[str]] = []
    outcomes = run_steps(
        steps, time.monotonic() + 600, tmp_path / "logs", lambda so_far: seen.append([o.state for o in so_far])
    )
    assert [(o.step, o.state) for o in outcomes] == [
        ("good", "ok"), ("bad", "FAILED"), ("endless", "cut off"), ("silent", "ok")
    ]  # fmt: skip
    assert outcomes[0].said == "done / well", "a record's table has bars of its own"
    assert outcomes[3].said == "silent.md"
    assert outcomes[1].said == "exit code 1: no such kernel"
    assert outcomes[2].said == "over its limit; until then: working"
    assert has_ended(int(pid.read_text())), "what a step started ends with it"
    assert seen == [["ok"], ["ok", "FAILED"], ["ok", "FAILED", "cut off"], ["ok", "FAILED", "cut off", "ok"]]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_who_stops_the_record_stops_its_step(number, tmp_path):
    pid = tmp_path / "pid"
    code = (
        "import sys, time, pathlib, signal; from benchmarks.parts.limited_steps import LimitedStep, run_steps; "
        "signal.signal(signal.SIGINT, signal.default_int_handler); "
        "run_steps([LimitedStep('endless', 600, [sys.executable, '-c', sys.argv[1]])], time.monotonic() + 600, "
        "pathlib.Path(sys.argv[2]), lambda so_far: None)"
    )
    command = [*python(code), STARTS_ANOTHER.format(path=str(pid)), str(tmp_path / "logs")]
    record = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    log = tmp_path / "logs" / "endless.log"
    while not (log.exists() and log.read_text()):
        assert record.poll() is None
        time.sleep(0.05)
    record.send_signal(number)
    assert record.wait() != 0
    assert has_ended(int(pid.read_text()))


def test_without_time_steps_are_skipped_by_name(tmp_path):
    steps = [LimitedStep(name, 60, python("")) for name in ("one", "two")]
    outcomes = run_steps(steps, time.monotonic() - 1, tmp_path, lambda so_far: None)
    assert [(o.step, o.state, o.said) for o in outcomes] == [
        ("one", "skipped", "no time was left"),
        ("two", "skipped", "no time was left"),
    ]


def test_every_command_of_the_record_takes_its_arguments():
    """On a GPU, where none of them has run: the parsers at least know what they are given."""
    for device, shapes in (("cuda", "2b"), ("cpu", "toy")):
        steps = steps_for(device, shapes, "gpu")
        assert [step.name for step in steps] == [
            "doctor", "train_step", "attention", "prefill", "kd", "stop_resume", "qwen3_5", "compile"
        ]  # fmt: skip
        for step in steps:
            interpreter, _, module, *arguments = step.command
            assert (ROOT / Path(*module.split(".")).with_suffix(".py")).exists()
            # argparse reads all arguments before it prints the help, and ends with 2 at one that it does not know.
            done = subprocess.run(
                [interpreter, "-m", module, *arguments, "--help"], cwd=ROOT, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stderr


def test_an_unknown_step_is_refused_with_the_known_ones():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--only", "doctr"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "--only: expected some of doctor, train_step, attention" in done.stderr
