"""What every trainer writes down of its steps: one JSON line each, with CPU seconds, loss and peak memory.

Runs in the environments of the peers, so it needs nothing but torch and transformers. A job is the JSON file that
`benchmarks.parts.peers.runs` writes for one start of one trainer.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import json
import resource
import sys
import time
import types
from pathlib import Path
from typing import Any

Job = dict[str, Any]


def read_job() -> Job:
    """The job that this process was started for."""
    return json.loads(Path(sys.argv[1]).read_text())


def resident(name: str) -> int:
    """Bytes of this process: VmRSS (now) or VmHWM (the most since `StepLog.begin`)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


class StepLog:
    """Appends a row for every finished step. The first is left out of what is measured: it pays for the start."""

    def __init__(self, path: str):
        self.path, self.held, self.loss = Path(path), 0, float("nan")
        self.wall, self.cpu = 0.0, 0.0

    def begin(self) -> None:
        """Before the first step: memory is counted from here on, and so is time."""
        # Freed memory that malloc keeps for itself would count as held.
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        self.held, self.wall, self.cpu = resident("VmRSS"), time.perf_counter(), time.process_time()
        children = resource.getrusage(resource.RUSAGE_CHILDREN)  # ours index in processes of their own
        start = self.cpu + children.ru_utime + children.ru_stime
        self._write({"start_cpu_s": start, "held_bytes": self.held})

    def stepped(self, step: int, loss: float) -> None:
        """Everything since the end of the last step counts as this one: data, forward, backward, update."""
        wall, cpu = time.perf_counter(), time.process_time()
        self._write(
            {
                "step": step,
                "loss": loss,
                "wall_s": wall - self.wall,
                "cpu_s": cpu - self.cpu,
                "peak_bytes": resident("VmHWM"),
            }
        )
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def _write(self, row: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def log_every_trainer(job: Job) -> None:
    """Let every Hugging Face Trainer of this process, and all that inherit from it, keep a StepLog."""
    import transformers

    class Callback(transformers.TrainerCallback):
        def __init__(self) -> None:
            self.log = StepLog(job["log"])

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.log.begin()

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
            # Steps log behind on_step_end: this is where a step's loss is known (logging_steps=1).
            if logs and "loss" in logs:
                self.log.stepped(state.global_step, float(logs["loss"]))

    init = transformers.Trainer.__init__

    @functools.wraps(init)  # ms-swift looks at the names of its arguments
    def with_log(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.add_callback(Callback())

    transformers.Trainer.__init__ = with_log


def allow_torchvision() -> None:
    """Let torchvision be imported beside a CPU build of torch.

    The wheel on the index is built for CUDA: its library does not load, and its Python part then misses two operators
    that it only describes. Declared, all of `torchvision.transforms` works. Nothing happens where the library loads.
    """
    import torch

    if torch.version.cuda is None:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        globals()["_declared"] = library  # they live as long as it does


def pretend_torchaudio() -> None:
    """An empty torchaudio: no CPU build of it goes with this torch, and LLaMA-Factory imports it whatever the data."""
    module = types.ModuleType("torchaudio")
    module.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
    sys.modules["torchaudio"] = module
