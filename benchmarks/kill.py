"""Kill drill: runs of the debug recipe, each killed at a random moment and started again until it is finished.

    python -m benchmarks.kill

SIGKILL goes to one rank, to every process of the run, and to the front process alone, in turn; every other kill waits
for a save and hits it half-written. A killed run must end with the losses, gradient norms and weights of the run that
nobody disturbed: bit for bit on the same number of ranks, and within a tolerance when it goes on with another number
(sums over ranks round differently). The run is one epoch, so equal steps mean that every sample was seen exactly once.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import load_file

from benchmarks.parts.record import markdown_table, write_record
from launch.processes import Process, descendants, ranks_below, send
from training.checkpoint.files import complete_checkpoints, incomplete_checkpoints, step_of
from training.composition.toy import build_toy_model
from training.tracking.tracker import read_metrics

ROOT = Path(__file__).parents[1]
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
        self.arguments = [
            "configs/debug.yaml", f"model.path={folder / 'toy'}", f"run.folder={folder}", f"run.name={name}",
            f"data.sources=[{{path: {folder / 'train.jsonl'}, root: {SAMPLES}}}]",
            f"data.eval_sources=[{{path: {folder / 'eval.jsonl'}, root: {SAMPLES}}}]",
            f"data.samples_per_step={SAMPLES_PER_STEP}", f"schedule.max_steps={NUM_STEPS}", "schedule.warmup_steps=2",
            "checkpoint.every_steps=1", "checkpoint.keep_last=3", "eval.at_start=false", *overrides,
        ]  # fmt: skip

    def start(self, num_ranks: int) -> subprocess.Popen:
        command = [sys.executable, "-m", "launch", *self.arguments, "--ranks", str(num_ranks)]
        with self.log.open("a") as log:
            return subprocess.Popen(
                command, cwd=ROOT, stdout=log, stderr=log, env=self.environment, start_new_session=True
            )

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


def drill_same_ranks(folder: Path, number: int, reference: Run, chance: random.Random) -> dict:
    run = Run(folder, f"killed-{number:02d}")
    kill = run.kill(Kill(VICTIMS[number % len(VICTIMS)], in_save=number % 2 == 1), chance)
    run.finish(2)
    return {**asdict(kill), "equal_bits": has_equal_bits(run, reference)}


def drill_other_ranks(folder: Path, number: int, dtype: str, reference: Run, chance: random.Random) -> dict:
    """2 ranks, killed; 1 rank, killed; 2 ranks to the end."""
    run = Run(folder, f"changed-{dtype}-{number:02d}", f"model.dtype={dtype}")
    for num_ranks in (2, 1):
        kill = run.kill(Kill(VICTIMS[number % len(VICTIMS)], in_save=number % 2 == 1, num_ranks=num_ranks), chance)
    run.finish(2)
    return {**asdict(kill), "dtype": dtype, "largest_difference": largest_difference(run, reference)}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--rank-changes", type=int, default=2, help="runs on 2, 1, 2 ranks, for each dtype")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="keep the runs in this folder")
    args = parser.parse_args()
    console, chance = Console(), random.Random(args.seed)
    folder = args.keep or Path(tempfile.mkdtemp(prefix="kill-"))
    prepare(folder)
    references = {
        "float32": Run(folder, "reference"),
        "bfloat16": Run(folder, "reference-bf16", "model.dtype=bfloat16"),
    }
    for dtype, reference in references.items():
        if dtype == "float32" or args.rank_changes:
            reference.finish(2)
    rows = []
    for number in range(args.runs):
        rows.append(drill_same_ranks(folder, number, references["float32"], chance))
        console.print(number + 1, rows[-1])
    changes = []
    for number in range(args.rank_changes):
        for dtype, reference in references.items():
            changes.append(drill_other_ranks(folder, number, dtype, reference, chance))
            console.print("2 -> 1 -> 2 ranks:", changes[-1])
    good = [row["equal_bits"] and not row["left_over"] for row in rows]
    limits = {"float32": 1e-5, "bfloat16": 1e-3}
    good += [row["largest_difference"] <= limits[row["dtype"]] and not row["left_over"] for row in changes]
    table = markdown_table(_table(rows, changes))
    console.print(table, f"\n{sum(good)} of {len(good)} drills passed")
    write_record("kill", {"steps": NUM_STEPS, "seed": args.seed, "runs": rows, "rank_changes": changes}, table)
    if not args.keep:
        shutil.rmtree(folder)
    return 0 if all(good) else 1


def _table(rows: list[dict], changes: list[dict]) -> list[dict]:
    table = []
    for victim in VICTIMS:
        mine = [row for row in rows if row["victim"] == victim]
        if mine:
            table.append(
                {
                    "killed": f"{victim}, 2 ranks",
                    "runs": len(mine),
                    "in a save": sum(row["in_save"] for row in mine),
                    "median steps done again": statistics.median(r["after_step"] - r["resumed_from"] for r in mine),
                    "same losses and weights": f"{sum(row['equal_bits'] for row in mine)}, bit-equal",
                    "processes left over": sum(len(row["left_over"]) for row in mine),
                }
            )
    for dtype in dict.fromkeys(row["dtype"] for row in changes):
        mine = [row for row in changes if row["dtype"] == dtype]
        worst = max(row["largest_difference"] for row in mine)
        table.append(
            {
                "killed": f"twice, 2 -> 1 -> 2 ranks, {dtype}",
                "runs": len(mine),
                "in a save": sum(row["in_save"] for row in mine),
                "median steps done again": statistics.median(r["after_step"] - r["resumed_from"] for r in mine),
                "same losses and weights": f"largest relative difference of a loss {worst:.1e}",
                "processes left over": sum(len(row["left_over"]) for row in mine),
            }
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
