"""docs/tutorial.md, run from its first command to its last as it is written, at a size that takes minutes.

The tests build on each other in the order of the page: one that fails takes those behind it along.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.ranks import ROOT
from training.__main__ import commands

TUTORIAL = ROOT / "docs" / "tutorial.md"
SETUP = ("git clone", "cd ", "make ", "source ")
"""What brought the tests here."""
SMALLER = {
    "python -m launch configs/tutorial.yaml": "data.samples_per_step=4 schedule.max_steps=12 schedule.warmup_steps=2 "
    "checkpoint.every_steps=4 eval.every_steps=0 eval.at_start=false",
    "python -m training.evaluate": "--limit 2",
}
"""Beginning of a command -> what makes it smaller."""
SAME_ANYWHERE = ("python -m pixelprune stats",)
"""Commands whose every line of output is as on the page."""


@dataclass(frozen=True)
class Step:
    """A command, or a program in Python; output: what the page shows behind it."""

    command: str
    output: str = ""
    is_python: bool = False


def steps() -> list[Step]:
    found = []
    for language, block in re.findall(r"^```(\w+)\n(.*?)^```", TUTORIAL.read_text(), re.MULTILINE | re.DOTALL):
        if language == "python":
            found.append(Step(block, is_python=True))
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:] if language == "console" else ():
            command, _, output = part.replace("\\\n", " ").partition("\n")
            found.append(Step(" ".join(command.split()), output))
    return [step for step in found if not step.command.startswith(SETUP)]


STEPS = steps()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A working directory with what the commands name; the packages are this checkout's."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "configs", folder / "configs")
    samples = shutil.ignore_patterns("*.index")
    shutil.copytree(ROOT / "data_tools" / "samples", folder / "data_tools" / "samples", ignore=samples)
    return folder


def test_the_page_has_what_it_promises():
    text = " ".join(step.command for step in STEPS)
    for part in ("stats", "show", "sheet", "inspect", "--dry-run", "report", "evaluate", "kd_weight", "export"):
        assert part in text, part
    assert sum("^C" in step.output for step in STEPS) == 1
    assert sum(step.is_python for step in STEPS) == 1


@pytest.mark.ranks
@pytest.mark.parametrize("step", STEPS, ids=[f"{n:02d}" for n in range(len(STEPS))])
def test_it_runs_as_written(step, checkout, request):
    said_file = checkout / f"output_{STEPS.index(step):02d}"
    command = ["python", "-c", step.command] if step.is_python else ["bash", "-c", f"exec {smaller(step.command)}"]
    environment = environment_of_a_user()
    with said_file.open("w+") as file:
        process = subprocess.Popen(command, cwd=checkout, env=environment, stdout=file, stderr=file)
        # A front process that is killed takes its ranks along.
        request.addfinalizer(process.kill)
        is_stopped = "^C" in step.output
        while is_stopped and process.poll() is None and "step 1/" not in said_file.read_text():
            time.sleep(0.05)
        if is_stopped:
            process.send_signal(signal.SIGINT)
        code = process.wait(500)
        file.seek(0)
        said = file.read()
    assert code == (85 if is_stopped else 0), said
    if step.command.startswith(SAME_ANYWHERE):
        assert [line for line in step.output.splitlines() if line not in ("...", *said.splitlines())] == []
    for name in re.findall(r"(?:-o|--out) (\S+)", step.command):
        assert (checkout / name).exists(), name


@pytest.mark.parametrize("module", ["training", *commands()])
def test_help_begins_with_an_example_that_works(module, checkout):
    """It is a command of the page, or is tried here."""
    first = called(f"python -m {module} --help", checkout).partition("\n")[0]
    example = first.removeprefix("example: ")
    assert example.startswith(f"python -m {module}"), first
    if example == "python -m training.doctor" or any(step.command.startswith(example) for step in STEPS):
        return  # the doctor takes minutes; test_doctor.py runs it
    if not (checkout / "runs/tutorial/start").exists():
        called("python -m training.toy_model runs/tutorial/start --texts data_tools/samples/train.jsonl", checkout)
    called(example, checkout)


def environment_of_a_user() -> dict[str, str]:
    """With the environment of this Python activated."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return os.environ | {"PYTHONPATH": str(ROOT), "PATH": path}


def called(command: str, folder: Path) -> str:
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment_of_a_user(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def smaller(command: str) -> str:
    added = [extra for beginning, extra in SMALLER.items() if command.startswith(beginning)]
    return " ".join([command, *added])
