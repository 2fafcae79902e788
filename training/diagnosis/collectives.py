"""All ranks of this machine add up: right sums, and how fast. Processes of their own, as in training."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as processes

from training.diagnosis.check import Bench, Finding

_ELEMENTS = 32 * 2**20
_TIMEOUT_SECONDS = 60


def collectives(bench: Bench) -> Finding:
    """Sums over every GPU of this machine with NCCL, over two processes with gloo where there is none or one."""
    num = torch.cuda.device_count() if bench.on_gpu else 2
    if bench.on_gpu and num == 1:
        return Finding("not here", "one GPU has nobody to talk to")
    backend = "nccl" if bench.on_gpu else "gloo"
    answer = bench.scratch / "collectives.json"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    context = processes.spawn(_rank, (num, backend, address, answer), nprocs=num, join=False)
    deadline = time.monotonic() + _TIMEOUT_SECONDS
    while not context.join(timeout=1):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            advice = "NCCL_DEBUG=INFO tells where; NCCL_P2P_DISABLE=1 helps on some boards"
            return Finding("FAILED", f"{num} ranks over {backend}: no answer in {_TIMEOUT_SECONDS} s", advice)
    found = json.loads(answer.read_text())
    figure = f"{num} ranks over {backend}: {found['gb_per_s']:.1f} GB/s of {_ELEMENTS * 4 / 1e6:.0f} MB"
    if not found["is_right"]:
        return Finding("FAILED", f"{figure}; wrong sums", "NCCL_P2P_DISABLE=1 helps on some boards", found)
    return Finding("ok", f"{figure}, right sums", details=found)


def _rank(rank: int, num: int, backend: str, address: str, answer: Path) -> None:
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    dist.init_process_group(backend, init_method=address, rank=rank, world_size=num)
    # Whole numbers: their sums are exact in float32, whatever the order.
    mine = torch.arange(_ELEMENTS, dtype=torch.float32, device=device).remainder_(1000).add_(rank)
    expected = torch.arange(_ELEMENTS, dtype=torch.float32, device=device).remainder_(1000).mul_(num)
    expected += num * (num - 1) / 2
    dist.all_reduce(mine)
    is_right = torch.equal(mine, expected)
    started = time.perf_counter()
    for _ in range(3):
        dist.all_reduce(mine)
    mine.sum().item()  # waits for the device
    seconds = (time.perf_counter() - started) / 3
    votes = [None] * num
    dist.all_gather_object(votes, is_right)
    if rank == 0:
        # Each rank sends and receives 2 (n - 1) / n of the data.
        gigabytes = 2 * (num - 1) / num * _ELEMENTS * 4 / 1e9
        answer.write_text(json.dumps({"is_right": all(votes), "gb_per_s": gigabytes / seconds, "ranks": num}))
    dist.destroy_process_group()
