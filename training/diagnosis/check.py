"""One thing that is looked at, and what was found."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

State = Literal["ok", "FAILED", "not here"]


@dataclass(frozen=True)
class Finding:
    """figure: what was measured, or why nothing could be. advice: what to do about it, where there is something."""

    state: State
    figure: str
    advice: str = ""
    details: dict[str, Any] = field(default_factory=dict)
    """More figures, for the JSON file."""


@dataclass(frozen=True)
class Bench:
    """Where the checks run."""

    device: torch.device
    run_folder: Path
    """Where runs will be written: its disk is measured."""
    scratch: Path
    """A folder of the doctor's own, for toy models."""

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def synchronize(self) -> None:
        """Wait for what is queued, so that a clock around it tells its time."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)


@dataclass(frozen=True)
class Check:
    """is_needed: whether training uses it without being asked to, so that nobody should start when it fails."""

    name: str
    look: Callable[[Bench], Finding]
    is_needed: bool = True


@dataclass(frozen=True)
class Result:
    check: Check
    finding: Finding
    seconds: float

    @property
    def forbids_training(self) -> bool:
        return self.finding.state == "FAILED" and self.check.is_needed

    def as_json(self) -> dict[str, Any]:
        finding = self.finding
        return {
            "check": self.check.name,
            "state": finding.state,
            "figure": finding.figure,
            "advice": finding.advice,
            "used_by_default": self.check.is_needed,
            "seconds": round(self.seconds, 2),
            **({"details": finding.details} if finding.details else {}),
        }


def perform(check: Check, bench: Bench) -> Result:
    """Look, whatever happens: an exception is a finding, and the next check has its turn."""
    started = time.perf_counter()
    try:
        finding = check.look(bench)
        bench.synchronize()
    except Exception as error:  # noqa: BLE001 - that is what a doctor is for; its kind and words are shown
        finding = Finding("FAILED", f"{type(error).__name__}: {_first_line(error)}")
    return Result(check, finding, time.perf_counter() - started)


def milliseconds(bench: Bench, do: Callable[[], object], repeats: int = 5) -> float:
    """Median of several, after one to warm up (one repeat on a CPU, where kernels are only shown to run)."""
    do()
    bench.synchronize()
    times = []
    for _ in range(repeats if bench.on_gpu else 1):
        started = time.perf_counter()
        do()
        bench.synchronize()
        times.append(1000 * (time.perf_counter() - started))
    return sorted(times)[len(times) // 2]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:300]
