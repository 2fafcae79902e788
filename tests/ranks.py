"""Start a program on several ranks through the real deepspeed launcher and read what its first rank wrote."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from launch.local import find_deepspeed, free_port

ROOT = Path(__file__).parent.parent


def start_ranks(module: str, num_ranks: int, *arguments: str) -> subprocess.CompletedProcess:
    """Run `python -m MODULE ARGUMENTS...` on `num_ranks` CPU ranks over gloo, to its end."""
    port = free_port()
    command = [
        find_deepspeed(), "--num_accelerators", str(num_ranks), "--master_port", str(port),
        "--module", module, *arguments,
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    left = list(Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"))
    assert not left, f"shared memory that outlives the ranks: {left}"
    return done


def run_ranks(module: str, num_ranks: int, out: Path, *arguments: str) -> dict:
    """The JSON that the first of these ranks writes to its first argument, OUT."""
    done = start_ranks(module, num_ranks, str(out), *arguments)
    if done.returncode:
        sys.stderr.write(done.stdout[-4000:] + done.stderr[-8000:])
        raise AssertionError(f"{module} on {num_ranks} ranks ended with exit code {done.returncode}")
    return json.loads(out.read_text())


def without_launcher_arguments(argv: list[str]) -> list[str]:
    """The deepspeed launcher puts --local_rank=N first among the arguments."""
    return [argument for argument in argv if not argument.startswith("--local_rank")]
