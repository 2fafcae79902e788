"""A run of the debug recipe in a drill: started as a user starts it, killed, started again, held against another."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file

from launch.processes import Process, descendants, ranks_below, send
from training.checkpoint.files import complete_checkpoints, incomplete_checkpoints, step_of
from training.composition.toy import build_toy_model
from training.tracking.tracker import read_metrics

ROOT = Path(__file__).parents[2]
SAMPLES = ROOT / "data_tools" / "samples"
NUM_STEPS, SAMPLES_PER_STEP = 12, 4
COMPARED = ("loss", "grad_norm", "num_samples", "num_supervised", "retain_ratio", "eval_loss")
VICTIMS = ("one rank", "every process", "front process")
START_SECONDS = 600


class DrillError(AssertionError):
    """A run that did not survive its kill; the message says where its log is."""


@dataclass
class Kill:
    """One SIGKILL, and what was there when it hit."""

    victim: str
    in_save: bool = False
    num_ranks: int = 2
    after_step: int = 0
    resumed_from: int = 0
    left_over: list[int] = field(default_factory=list)


class Run:
    """One run folder, started, killed and started again by its command line."""

    def __init__(self, folder: Path, name: str, *overrides: str, environment: dict[str, str] | None = None):
        self.folder = folder / name
        self.environment = environment
        self.log = folder / f"{name}.log"
        self._writers: list[subprocess.Popen] = []
        self.arguments = [
            "configs/debug.yaml", f"model.path={folder / 'toy'}", f"run.folder={folder}", f"run.name={name}",
            f"data.sources=[{{path: {folder / 'train.jsonl'}, root: {SAMPLES}}}]",
            f"data.eval_sources=[{{path: {folder / 'eval.jsonl'}, root: {SAMPLES}}}]",
            f"data.samples_per_step={SAMPLES_PER_STEP}", f"schedule.max_steps={NUM_STEPS}", "schedule.warmup_steps=2",
            "checkpoint.every_steps=1", "checkpoint.keep_last=3", "eval.at_start=false", *overrides,
        ]  # fmt: skip

    def start(self, num_ranks: int) -> subprocess.Popen:
        command = [sys.executable, "-m", "launch", *self.arguments, "--ranks", str(num_ranks)]
        # Through a pipe: ranks whose files a drill lets grow no more can still say so.
        with self.log.open("a") as log:
            writer = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=log, start_new_session=True)
        self._writers.append(writer)
        assert writer.stdin is not None
        with writer.stdin as pipe:
            return subprocess.Popen(
                command, cwd=ROOT, stdout=pipe, stderr=pipe, env=self.environment, start_new_session=True
            )

    def said(self) -> str:
        """What all starts wrote; waits until nobody writes any more."""
        for writer in self._writers:
            writer.wait(START_SECONDS)
        return self.log.read_text()

    def finish(self, num_ranks: int) -> None:
        code = self.start(num_ranks).wait(START_SECONDS)
        if code != 0:
            raise DrillError(f"{self.folder.name} ended with exit code {code}; see {self.log}")

    def kill(self, kill: Kill, chance: random.Random) -> Kill:
        """Start on kill.num_ranks, send the SIGKILL at a random step, and wait until nothing of the run is alive."""
        front = self.start(kill.num_ranks)
        first = self.newest_step()
        target = chance.randrange(first, NUM_STEPS - 1)
        deadline = time.monotonic() + START_SECONDS
        while not self._is_time(kill, target) and front.poll() is None:
            if time.monotonic() > deadline:
                raise DrillError(f"{self.folder.name} does not reach step {target}; see {self.log}")
            time.sleep(0.002)
        delay = chance.random() * 0.5
        if not kill.in_save and target < NUM_STEPS - 4:  # later the run could be over by then
            time.sleep(delay)
        victims = {
            "one rank": lambda: chance.sample(ranks := ranks_below(front.pid), min(1, len(ranks))),
            "every process": lambda: [*descendants(front.pid), _process(front.pid)],
            "front process": lambda: [_process(front.pid)],
        }[kill.victim]()
        if not victims:
            raise DrillError(f"{self.folder.name} was over before its kill; use another --seed")
        kill.in_save = bool(incomplete_checkpoints(self.folder / "checkpoints"))
        for victim in victims:
            send(victim, signal.SIGKILL)
        front.wait(START_SECONDS)
        kill.left_over = self._left_over()
        kill.after_step = max((row["step"] for row in read_metrics(self.folder)), default=0)
        kill.resumed_from = self.newest_step()
        return kill

    def newest_step(self) -> int:
        return max(map(step_of, complete_checkpoints(self.folder / "checkpoints")), default=0)

    def _is_time(self, kill: Kill, target: int) -> bool:
        if kill.in_save:
            return any(step_of(f) > target for f in incomplete_checkpoints(self.folder / "checkpoints"))
        return max((row["step"] for row in read_metrics(self.folder)), default=0) > target

    def _left_over(self) -> list[int]:
        """Living processes that name this run in their command line, a minute after the front process ended."""
        deadline = time.monotonic() + 60
        while (found := _naming(f"run.name={self.folder.name}")) and time.monotonic() < deadline:
            time.sleep(0.1)
        return found

    def steps(self) -> list[dict]:
        """What is compared of every row of metrics."""
        rows = read_metrics(self.folder)
        return [{"step": row["step"], **{key: row[key] for key in COMPARED if key in row}} for row in rows]

    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "export" / "model.safetensors")


def has_equal_bits(run: Run, reference: Run) -> bool:
    """Same rows of metrics and same exported weights, compared as bits."""
    ours, theirs = run.weights(), reference.weights()
    same_weights = ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    return run.steps() == reference.steps() and same_weights


def largest_difference(run: Run, reference: Run) -> float:
    """Largest relative difference of a loss; infinite when steps or sample counts differ."""
    pairs = list(zip(run.steps(), reference.steps(), strict=False))
    exact = ("step", "num_samples", "num_supervised", "retain_ratio")
    if len(run.steps()) != len(reference.steps()) or any(a.get(k) != b.get(k) for a, b in pairs for k in exact):
        return float("inf")
    return max(abs(a[k] - b[k]) / abs(b[k]) for a, b in pairs for k in ("loss", "eval_loss") if k in b)


def prepare(folder: Path) -> None:
    """Toy model, one epoch of records and a few held-out ones."""
    folder.mkdir(parents=True, exist_ok=True)
    build_toy_model(folder / "toy")
    for split, number in (("train", NUM_STEPS * SAMPLES_PER_STEP), ("eval", 4)):
        lines = (SAMPLES / f"{split}.jsonl").read_text().splitlines()[:: 3 if split == "train" else 20]
        (folder / f"{split}.jsonl").write_text("\n".join(lines[:number]) + "\n")


def _process(pid: int) -> Process:
    return next(process for process in descendants(os.getpid()) if process.pid == pid)


def _naming(text: str) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                arguments = (entry / "cmdline").read_bytes().split(b"\0")
            except (FileNotFoundError, ProcessLookupError):
                continue
            if text.encode() in arguments:
                found.append(int(entry.name))
    return found
