"""Commands one after the other, each with a limit: none can hold up or break the rest."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

_GRACE_SECONDS = 10.0
_LEAST_SECONDS = 15.0
"""Less is not worth a start."""


@dataclass(frozen=True)
class LimitedStep:
    name: str
    limit: float
    """Seconds."""
    command: Sequence[str]
    record: str = ""
    """The file that it writes, for who reads what became of it."""


@dataclass(frozen=True)
class Outcome:
    """What became of a step. said: its record, or the last line of its output, or why it did not run."""

    step: str
    state: Literal["ok", "FAILED", "cut off", "skipped"]
    seconds: float
    limit: float
    said: str


def run_steps(
    steps: Sequence[LimitedStep], deadline: float, logs: Path, keep: Callable[[list[Outcome]], None]
) -> list[Outcome]:
    """Run every step for which time is left; `keep` is called with all outcomes after each one.

    deadline: of `time.monotonic()`. A step's output goes to logs/NAME.log. One over its limit is asked to end, then
    killed with everything it started.
    """
    logs.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, _leave)
    outcomes: list[Outcome] = []
    for step in steps:
        limit = min(step.limit, deadline - time.monotonic())
        if limit < min(_LEAST_SECONDS, step.limit):
            outcomes.append(Outcome(step.name, "skipped", 0.0, max(0.0, limit), "no time was left"))
        else:
            outcomes.append(_run(step, limit, logs / f"{step.name}.log"))
        keep(outcomes)
    return outcomes


def _leave(number: int, _: object) -> None:
    """By an exception, which takes the running step along: it has a session of its own, and would go on alone."""
    raise SystemExit(128 + number)


def _run(step: LimitedStep, limit: float, log: Path) -> Outcome:
    started = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(step.command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
    seconds = time.monotonic() - started
    if code is None:
        return Outcome(step.name, "cut off", seconds, limit, f"over its limit; until then: {_last_line(log)}")
    state: Literal["ok", "FAILED"] = "ok" if code == 0 else "FAILED"
    said = f"exit code {code}: {_last_line(log)}" if code else step.record or _last_line(log)
    return Outcome(step.name, state, seconds, limit, said)


def _end(process: subprocess.Popen) -> None:
    """End the step's whole session: asked first, since a launcher ends its ranks itself."""
    if process.poll() is None:
        _signal(process, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_SECONDS)
    _signal(process, signal.SIGKILL)
    process.wait()


def _signal(process: subprocess.Popen, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # all have ended
        os.killpg(process.pid, number)


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:200].replace("|", "/") if lines else ""
