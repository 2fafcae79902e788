"""The whole GPU record with one command, in order of value, whatever breaks on the way.

    python -m benchmarks.gpu                                        # everything, one GPU; 23 minutes at most
    python -m benchmarks.gpu --minutes 9 --only doctor train_step   # the most for little time
    python -m benchmarks.gpu --device cpu --shapes toy --minutes 15 # a rehearsal without a GPU

Each step is a command of its own with its own limit; its record is written before the next one starts, and one that
fails or is cut off does not stop the rest. Needs no network, no DNS and no rendezvous. What every step did stands in
the record of this command, written anew after each; its output in the folder of --logs.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from benchmarks.parts.limited_steps import LimitedStep, Outcome, run_steps
from benchmarks.parts.record import RESULTS, markdown_table, write_record
from benchmarks.parts.shapes import SHAPES


def steps_for(device: str, shapes: str, name: str) -> list[LimitedStep]:
    """In order of value. Limits are for an H100 and 2B shapes; a rehearsal on a CPU takes less."""
    on_cuda = device == "cuda"
    bench = ["--shapes", shapes, "--device", device]
    # Toy towers on a CPU: one small screenshot, few steps.
    small = [] if on_cuda else ["--megapixels", "0.1", "--rounds", "1"]
    one_small = [] if on_cuda else ["--num-images", "1", "--max-pixels", "262144", "--repeats", "1"]
    few = ["--pack-samples", "2", "--packs", "1", "--workers", "0", "--block", "2"] if on_cuda else []
    dtype = ["model.dtype=bfloat16"] if on_cuda else []

    def step(what: str, seconds: float, module: str, *arguments: str) -> LimitedStep:
        command = [sys.executable, "-m", f"benchmarks.{module}", *arguments, "--name", f"{name}_{what}"]
        return LimitedStep(what, seconds, command, f"{name}_{what}.md")

    folder, found = f"runs/{name}", RESULTS / f"{name}_doctor.json"
    doctor = [sys.executable, "-m", "training.doctor", "--device", device, "--json", str(found)]
    hybrid = ["--recipe", "configs/debug_qwen3_5.yaml", "--family", "qwen3_5", "--folder", f"{folder}/qwen3_5"]
    return [
        LimitedStep("doctor", 120, doctor),
        step("train_step", 240, "train_step", *bench, *small),
        step("attention", 60, "attention", "--device", device),
        step("prefill", 90, "prefill", *bench, *one_small),
        step("kd", 240, "train_step", *bench, *small, *few, "--kd"),
        step("stop_resume", 180, "stop_resume", "--folder", f"{folder}/stop", *dtype),
        step("qwen3_5", 180, "stop_resume", *hybrid, *dtype),
        step("compile", 240, "train_step", *bench, *small, *few, "model.compile=true"),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", choices=SHAPES, help="default 2b on cuda, toy on cpu")
    parser.add_argument("--minutes", type=float, default=25, help="for all steps together")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="these steps alone, in the usual order")
    parser.add_argument("--logs", type=Path, default=Path("runs/gpu_record"), help="folder of the steps' output")
    parser.add_argument("--name", help="start of the records' names; default gpu, or gpu_rehearsal on a CPU")
    arguments = parser.parse_args()
    on_cuda = arguments.device == "cuda"
    shapes = arguments.shapes or ("2b" if on_cuda else "toy")
    name = arguments.name or ("gpu" if on_cuda else "gpu_rehearsal")
    steps = steps_for(arguments.device, shapes, name)
    known = [step.name for step in steps]
    if unknown := set(arguments.only or ()) - set(known):
        parser.error(f"--only: expected some of {', '.join(known)}, got {', '.join(sorted(unknown))}")
    steps = [step for step in steps if not arguments.only or step.name in arguments.only]

    def keep(outcomes: list[Outcome]) -> None:
        latest = outcomes[-1]
        print(f"{latest.state:8} {latest.step:12} {latest.seconds:6.0f} s  {latest.said}", flush=True)
        rows = [
            {"step": o.step, "state": o.state, "seconds": f"{o.seconds:.0f} of {o.limit:.0f}", "record": o.said}
            for o in outcomes
        ]
        payload = {"device": arguments.device, "shapes": shapes, "steps": [vars(outcome) for outcome in outcomes]}
        write_record(name, payload, f"{shapes} shapes on {arguments.device}.\n\n{markdown_table(rows)}")

    deadline = time.monotonic() + 60 * arguments.minutes
    outcomes = run_steps(steps, deadline, arguments.logs, keep)
    return 0 if all(outcome.state == "ok" for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
