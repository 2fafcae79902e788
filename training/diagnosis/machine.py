"""What the machine is: versions, GPU, shared memory, open files, the disk of the runs, DeepSpeed's build lock."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from packaging.version import Version

from training.diagnosis.check import Bench, Finding
from training.distributed.build_lock import build_lock, owner_of
from training.tracking.hardware import peak_flops

SHOWN = ("torch", "transformers", "deepspeed", "numba", "numpy")
OPTIONAL = ("flash-attn", "flash-attn-3", "liger-kernel", "flash-linear-attention", "causal-conv1d", "vllm")
TOO_OLD = {
    "torch": ("2.11", "its varlen attention lacks a scale and a window"),
    "transformers": ("5.20", "the stock vision tower takes no geometry in training"),
    "deepspeed": ("0.19.8", "it rounds rotary frequencies to bfloat16"),
    "omegaconf": ("2.4", "recipes' choices are not understood"),
}
"""First version that is right, and what an older one does. Vendors' builds are called 2.11.0a0+..., which counts."""

GIB = 2**30
_LEAST_SHM = GIB
_LEAST_FILES = 1024
_DISK_BYTES = 256 * 2**20
_BYTES_PER_WEIGHT = 14
"""Of a checkpoint: bfloat16 weights, float32 master weights and two moments."""


def versions(bench: Bench) -> Finding:
    """Of everything that training imports; known-bad ones by name."""
    found = {name: number for name in (*SHOWN, *TOO_OLD, *OPTIONAL) if (number := _version(name))}
    missing = [name for name in (*SHOWN, *TOO_OLD) if name not in found]
    old = [
        f"{name} {found[name]} < {first}: {what}"
        for name, (first, what) in TOO_OLD.items()
        if name in found and Version(found[name]).release < Version(first).release
    ]
    figure = f"python {platform.python_version()}, " + ", ".join(f"{name} {number}" for name, number in found.items())
    if missing or old:
        problems = "; ".join([*(f"{name} is missing" for name in missing), *old])
        return Finding("FAILED", problems, "pip install -e '.[train]' with the project's constraints.txt", dict(found))
    return Finding("ok", figure, details=dict(found))


def gpu(bench: Bench) -> Finding:
    """Name, compute capability, memory, and whether its peak is known."""
    if not bench.on_gpu:
        built = torch.version.cuda
        if built is None:
            return Finding("not here", "this torch was built for CPUs; training runs on the CPU")
        return Finding("not here", f"torch for CUDA {built} sees no GPU", "nvidia-smi tells whether there is a driver")
    name, (major, minor) = torch.cuda.get_device_name(bench.device), torch.cuda.get_device_capability(bench.device)
    free, total = torch.cuda.mem_get_info(bench.device)
    peak = peak_flops(bench.device)
    figure = (
        f"{torch.cuda.device_count()} x {name}, compute capability {major}.{minor}, CUDA {torch.version.cuda}, "
        f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free, "
        + (f"{peak / 1e12:.0f} TFLOP/s in bfloat16" if peak else "peak unknown: no MFU")
    )
    if free < 0.8 * total:
        return Finding("ok", figure, "another process holds its memory: nvidia-smi tells which")
    return Finding("ok", figure)


def shared_memory(bench: Bench) -> Finding:
    """Where loader workers hand over packs, and NCCL ranks of one host their data."""
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return Finding("not here", "no /dev/shm on this system")
    usage = shutil.disk_usage(folder)
    figure = f"{usage.free / GIB:.1f} of {usage.total / GIB:.1f} GiB free"
    if usage.free < _LEAST_SHM:
        return Finding("FAILED", figure, "start the container with --shm-size=16g (or --ipc=host)")
    return Finding("ok", figure)


def open_files(bench: Bench) -> Finding:
    """Files that a process may hold open: every tensor from a loader worker is one for a while."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    figure = f"{soft} (at most {hard if hard != resource.RLIM_INFINITY else 'unlimited'})"
    if soft != resource.RLIM_INFINITY and soft < _LEAST_FILES:
        return Finding("FAILED", figure, f"ulimit -n {_LEAST_FILES * 16}")
    return Finding("ok", figure)


def disk(bench: Bench) -> Finding:
    """Speed and room of the runs' folder, with what that means for a checkpoint of a 2B model."""
    folder = bench.run_folder
    folder.mkdir(parents=True, exist_ok=True)
    block = os.urandom(2**20)
    with tempfile.TemporaryFile(dir=folder) as file:  # without a name: nothing is left by a doctor that is killed
        started = time.perf_counter()
        for _ in range(_DISK_BYTES // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        speed = _DISK_BYTES / (time.perf_counter() - started)
    size, free = 2.1e9 * _BYTES_PER_WEIGHT, shutil.disk_usage(folder).free
    figure = (
        f"{speed / 1e6:.0f} MB/s written in {folder}, {free / 1e9:.0f} GB free; a checkpoint of a 2B model is "
        f"{size / 1e9:.0f} GB, {size / speed:.0f} s"
    )
    if free < 3 * size:
        return Finding("ok", figure, "no room for three such checkpoints: run.folder, checkpoint.keep")
    return Finding("ok", figure)


def stale_lock(bench: Bench) -> Finding:
    """A killed process leaves torch's lock on DeepSpeed's extension, and later ones wait for ever."""
    lock = build_lock()
    try:
        age = time.time() - lock.stat().st_mtime
    except FileNotFoundError:
        return Finding("ok", "none")
    if owner := owner_of(lock):
        return Finding("ok", f"process {owner} is building DeepSpeed's extension now")
    return Finding(
        "FAILED", f"left {age:.0f} s ago by a killed process: {lock}", "python -m launch clears it; or rm it"
    )


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
