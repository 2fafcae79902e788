"""A run through the real launcher: started, stopped in its midst, continued to its end, exported.

    python -m benchmarks.stop_resume                       # configs/debug.yaml on toy weights
    python -m benchmarks.stop_resume --recipe configs/debug_qwen3_5.yaml --family qwen3_5 --ranks 1

For machines on which nothing has run yet: exit codes, seconds until the first step, steps that were done twice (none
should be), and the losses of all steps. `benchmarks.kill` is the drill with SIGKILL and equal bits.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.parts.record import markdown_table, write_record
from pixelprune.family import FAMILIES
from training.exit_codes import RESUMABLE
from training.tracking.metrics_file import read_metrics

ROOT = Path(__file__).parents[1]
STOP_AFTER = 3


def launch(arguments: list[str], log: Path) -> subprocess.Popen:
    with log.open("a") as file:
        return subprocess.Popen([sys.executable, "-m", "launch", *arguments], cwd=ROOT, stdout=file, stderr=file)


def steps_of(run: Path) -> list[dict]:
    return [row for row in read_metrics(run) if "loss" in row]


def stop_in_its_midst(run: Path, arguments: list[str], log: Path, seconds: float) -> tuple[int, float]:
    """Exit code, and seconds until the first step was done."""
    started, front = time.monotonic(), launch(arguments, log)
    first = None
    try:
        while front.poll() is None and time.monotonic() - started < seconds:
            done = len(steps_of(run)) if run.exists() else 0
            if done and first is None:
                first = time.monotonic() - started
            if done >= STOP_AFTER:
                (run / "stop").touch()
                break
            time.sleep(0.2)
        code = front.wait(seconds)
    finally:
        if front.poll() is None:
            front.terminate()
            front.wait()
    if first is None:
        raise SystemExit(f"no step was done (exit code {code}); see {log}")
    return code, first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="configs/debug.yaml")
    parser.add_argument("--family", choices=FAMILIES, default="qwen3_vl")
    parser.add_argument("--ranks", type=int, default=max(1, torch.cuda.device_count()))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=300, help="limit of each of the two starts")
    parser.add_argument("--folder", type=Path, default=Path("runs/stop_resume"))
    parser.add_argument("--name", default="stop_resume", help="name of the record under benchmarks/results")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_intermixed_args()
    folder = options.folder.absolute()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    toy = [sys.executable, "-m", "training.toy_model", str(folder / "toy"), "--family", options.family]
    subprocess.run([*toy, "--texts", "data_tools/samples/train.jsonl"], cwd=ROOT, check=True)
    run, log = folder / "run", folder / "log"
    arguments = [
        options.recipe, "--ranks", str(options.ranks), f"model.path={folder / 'toy'}", f"run.folder={folder}",
        "run.name=run", f"schedule.max_steps={options.steps}", f"data.index_dir={folder / 'index'}",
        "data.eval_sources=[]", *options.overrides,
    ]  # fmt: skip
    stopped, first_step = stop_in_its_midst(run, arguments, log, options.seconds)
    after_stop = [row["step"] for row in steps_of(run)]
    started = time.monotonic()
    resumed = launch(arguments, log).wait(options.seconds)
    took = time.monotonic() - started
    rows = steps_of(run)
    steps = [row["step"] for row in rows]
    report = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "ranks": options.ranks,
        "exit code of the stop": stopped,
        "expected": RESUMABLE,
        "stopped after step": after_stop[-1] if after_stop else 0,
        "exit code of the resume": resumed,
        "steps done twice": len(steps) - len(set(steps)),
        "steps": len(set(steps)),
        "exported": (run / "export" / "model.safetensors").exists(),
        "first step after": f"{first_step:.0f} s",
        "resume took": f"{took:.0f} s",
        "loss": f"{rows[0]['loss']:.3f} -> {rows[-1]['loss']:.3f}",
    }
    table = markdown_table([{"what": key, "found": value} for key, value in report.items()])
    print(table)
    losses = {row["step"]: row["loss"] for row in rows}
    write_record(options.name, {"recipe": options.recipe, "report": report, "losses": losses}, table)
    if (stopped, resumed) != (RESUMABLE, 0) or len(steps) != options.steps or not report["exported"]:
        raise SystemExit(f"not as it should be; see {log}")


if __name__ == "__main__":
    main()
