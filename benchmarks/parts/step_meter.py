"""Times and memory of one optimizer step as the device spends them, on top of the meter that training uses."""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import record_function

from training.tracking.meter import StepMeter

PHASES = ("data_wait", "forward", "backward", "optimizer")
RESET_PEAK = "5"
"""Written to clear_refs, it sets the process's high-water mark to what it holds now."""


class DeviceMeter(StepMeter):
    """A StepMeter of one rank whose phases are ranges of the profiler too, named as they are here."""

    @contextmanager
    def timing(self, name: str) -> Iterator[None]:
        with record_function(name), super().timing(name):
            yield

    def finish_step(self) -> tuple[dict[str, float], dict[str, float]]:
        """Seconds by phase and of the step, and the metrics that a run logs; the device has finished the step."""
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize(self.ranks.device)
        metrics = self.finish()
        seconds = {name: metrics[f"{name}_share"] * metrics["step_s"] for name in PHASES}
        return seconds | {"step": metrics["step_s"]}, metrics


class PhaseMeter(DeviceMeter):
    """A DeviceMeter that counts the processor's seconds of each phase too, for machines that do other work."""

    loss: float
    """Of the step, once it is finished."""

    def begin(self) -> None:
        super().begin()
        self.cpu = dict.fromkeys(PHASES, 0.0)

    @contextmanager
    def timing(self, name: str) -> Iterator[None]:
        begun = time.process_time()
        with super().timing(name):
            yield
        self.cpu[name] += time.process_time() - begun

    def finish_phases(self) -> dict[str, float]:
        """Seconds by phase: of the processor, or on a GPU those that the device took."""
        cpu = self.cpu
        seconds, metrics = self.finish_step()
        self.loss = float(metrics["loss"])
        return seconds if self.ranks.device.type == "cuda" else cpu


def reset_peak(device: torch.device) -> None:
    """Start a new high-water mark of memory: the device's, or on a CPU this process's."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        # Freed memory that malloc keeps for itself would count as held.
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text(RESET_PEAK)


def peak_bytes(device: torch.device) -> int | None:
    """Most bytes held since `reset_peak`; None where it cannot be known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform != "linux":
        return None
    lines = Path("/proc/self/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), None)
