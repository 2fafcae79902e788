"""The GPU record's steps: none stops the rest, and what is cut off says so and leaves nothing running."""

from __future__ import annotations

import json
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


PARSE_ALL = """
import argparse, json, runpy, sys
def ends_after(parse):
    def parse_and_end(self, *args, **options):
        parse(self, *args, **options)
        sys.exit("parsed")
    return parse_and_end
for name in ("parse_args", "parse_intermixed_args"):
    setattr(argparse.ArgumentParser, name, ends_after(getattr(argparse.ArgumentParser, name)))
ends = []
for module, *arguments in json.loads(sys.argv[1]):
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        ends.append([module, "went on"])
    except SystemExit as end:
        ends.append([module, end.code])
print(json.dumps(ends), file=sys.stderr)
"""
"""All commands in one process (imports are most of what they take), each as far as its arguments are read."""


def ends_of(commands: list[list[str]]) -> list[list]:
    done = subprocess.run(
        [sys.executable, "-c", PARSE_ALL, json.dumps(commands)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stderr.splitlines()[-1])


def test_every_command_of_the_record_takes_its_arguments():
    """On a GPU, where none of them has run: the parsers at least know what they are given."""
    for device, shapes in (("cuda", "2b"), ("cpu", "toy")):
        steps = steps_for(device, shapes, "gpu")
        assert [step.name for step in steps] == [
            "doctor", "train_step", "attention", "prefill", "kd", "stop_resume", "qwen3_5", "compile"
        ]  # fmt: skip
        modules = [step.command[2] for step in steps]
        assert all((ROOT / Path(*module.split(".")).with_suffix(".py")).exists() for module in modules)
        assert ends_of([step.command[2:] for step in steps]) == [[module, "parsed"] for module in modules]


def test_a_command_with_an_argument_nobody_knows_would_be_seen():
    assert ends_of([["benchmarks.attention", "--devise", "cuda"]]) == [["benchmarks.attention", 2]]


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
