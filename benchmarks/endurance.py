"""What a run costs when nothing happens: host memory over many steps, and the time until `--show` has answered.

    python -m benchmarks.endurance

500 steps of the debug recipe on one rank, loader workers off so that everything is in one process. Memory is the
resident set of the process as metrics.jsonl has it, as medians over fifths of the run. The first fifths hold warm-up:
caches, allocator pools for packs of every length, the first checkpoints.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console

from benchmarks.parts.record import markdown_table, write_record
from training.composition.toy import build_toy_model
from training.tracking.tracker import read_metrics

ROOT = Path(__file__).parents[1]


def host_memory(folder: Path, num_steps: int) -> list[float]:
    """GB of host memory after each step."""
    build_toy_model(folder / "toy")
    settings = [
        f"model.path={folder / 'toy'}", f"run.folder={folder}", f"schedule.max_steps={num_steps}",
        "data.samples_per_step=2", "data.eval_sources=[]", "checkpoint.every_steps=100",
        f"data.index_dir={folder / 'index'}",
    ]  # fmt: skip
    command = [sys.executable, "-m", "launch", "configs/debug.yaml", *settings, "--ranks", "1"]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return [row["host_memory_gb"] for row in read_metrics(folder / "debug") if "host_memory_gb" in row]


def seconds_to_show(repeats: int) -> list[float]:
    """Wall time of `python -m training.train RECIPE --show`, imports included."""
    command = [sys.executable, "-m", "training.train", "configs/gui_grounding.yaml", "--show"]
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        seconds.append(time.perf_counter() - started)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    shown = seconds_to_show(args.repeats)
    with tempfile.TemporaryDirectory() as folder:
        memory = host_memory(Path(folder), args.steps)
    fifth = len(memory) // 5
    fifths = [statistics.median(memory[start : start + fifth]) for start in range(0, 5 * fifth, fifth)]
    row = {f"steps {i * fifth + 1}-{(i + 1) * fifth}": f"{1000 * m:.0f} MB" for i, m in enumerate(fifths)}
    table = markdown_table([row | {"--show (median)": f"{statistics.median(shown):.2f} s"}])
    Console(width=140).print(table)
    write_record("endurance", {"host_memory_gb": memory[:: max(1, len(memory) // 50)], "show_s": shown}, table)


if __name__ == "__main__":
    main()
