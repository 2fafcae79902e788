"""Times and memory of one optimizer step as the device spends them, on top of the meter that training uses."""

from __future__ import annotations

import ctypes
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import record_function

from training.engine import Ranks
from training.meter import StepMeter

PHASES = ("data_wait", "forward", "backward", "optimizer")
RESET_PEAK = "5"
"""Written to clear_refs, it sets the process's high-water mark to what it holds now."""


class DeviceMeter(StepMeter):
    """A StepMeter whose forward, backward and optimizer times are the device's, without a wait between them.

    The waiting for data is the host's. Every phase is also a range of the profiler, named as it is here.
    """

    def __init__(self, ranks: Ranks):
        super().__init__(ranks)
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._marks: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    def timing(self, name: str) -> Any:
        return self._timed(name)

    @contextmanager
    def _timed(self, name: str):
        on_device = self.ranks.device.type == "cuda" and name != "data_wait"
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if on_device else []
        started = time.perf_counter()
        with record_function(name):
            if events:
                events[0].record()
            yield
            if events:
                events[1].record()
        if events:
            self._marks.append((name, events[0], events[1]))
        else:
            self.seconds[name] += time.perf_counter() - started

    def finish_step(self) -> tuple[dict[str, float], dict[str, float]]:
        """Seconds by phase and of the step, and the metrics that a run logs; the device has finished the step."""
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize(self.ranks.device)
        metrics = self.finish()
        for name, start, end in self._marks:
            self.seconds[name] += start.elapsed_time(end) / 1000
        return self.seconds | {"step": metrics["step_s"]}, metrics


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
