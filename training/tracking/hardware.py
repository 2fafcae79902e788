"""What the device can do at most, for the MFU metric, and how much memory was used."""

from __future__ import annotations

import logging
import resource
from functools import lru_cache

import psutil
import torch

logger = logging.getLogger(__name__)

_DENSE_BF16_FLOPS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA A800-SXM4-40GB": 312e12,
    "NVIDIA A800-SXM4-80GB": 312e12,
    "NVIDIA A800 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA H800": 989e12,
    "NVIDIA H800 PCIe": 756e12,
    "NVIDIA H20": 148e12,
    "NVIDIA H20-3e": 148e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA GB200": 2500e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA GeForce RTX 4090": 165e12,
    "NVIDIA RTX PRO 6000 Blackwell Workstation Edition": 503e12,
    "NVIDIA RTX PRO 6000 Blackwell Server Edition": 503e12,
}
"""Peak dense bf16 FLOP/s by the vendors' data sheets, by the name that the driver gives, whole: "H100" is the start of
three devices with three peaks, and a slice of one (MIG) has a name of its own."""


def peak_flops(device: torch.device) -> float | None:
    """Peak dense bf16 FLOP/s of a known accelerator; None otherwise: no MFU is reported then, said once in the log."""
    return _peak_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


@lru_cache
def _peak_of(name: str) -> float | None:
    flops = _DENSE_BF16_FLOPS.get(name)
    if flops is None:
        logger.warning("no MFU: the peak of %r is not known (training/tracking/hardware.py lists those that are)", name)
    return flops


def peak_memory_gb(device: torch.device) -> float:
    """Most memory this rank held so far: of the accelerator, or of the process on a CPU. GB = 1e9 bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def host_memory_gb() -> float:
    """Host memory that this rank's process holds now (resident set). GB = 1e9 bytes."""
    return psutil.Process().memory_info().rss / 1e9
