"""What the device can do at most, for the MFU metric, and how much memory was used."""

from __future__ import annotations

import resource

import psutil
import torch

_DENSE_BF16_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}
"""Peak dense bf16 FLOP/s by the vendors' data sheets, matched against the device's name; first match counts."""


def peak_flops(device: torch.device) -> float | None:
    """Peak dense bf16 FLOP/s of a known accelerator, None otherwise (then no MFU is reported)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for key, flops in _DENSE_BF16_FLOPS.items() if key in name), None)


def peak_memory_gb(device: torch.device) -> float:
    """Most memory this rank held so far: of the accelerator, or of the process on a CPU. GB = 1e9 bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def host_memory_gb() -> float:
    """Host memory that this rank's process holds now (resident set). GB = 1e9 bytes."""
    return psutil.Process().memory_info().rss / 1e9
