"""Benchmark records: a JSON file and a small table, with the machine and the versions they were measured on."""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results"
PACKAGES = ("torch", "transformers", "deepspeed", "numpy", "numba", "deflate", "flash-attn", "liger-kernel")


def describe_machine() -> dict[str, Any]:
    """Processor, cores, memory in GiB, accelerator if any, and the versions that matter."""
    import torch

    cpu_info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in _lines(cpu_info) if line.startswith("model name")]
    memory_kib = [int(line.split()[1]) for line in _lines(Path("/proc/meminfo")) if line.startswith("MemTotal")]
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(memory_kib[0] / 2**20, 1) if memory_kib else None,
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch_threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **_versions()},
    }


def markdown_table(rows: Sequence[Mapping[str, object]]) -> str:
    """Rows with the same keys -> a Markdown table with these keys as its head."""
    head = list(rows[0])
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(str(row[key]) for key in head) + " |" for row in rows]
    return "\n".join(lines)


def write_record(name: str, payload: Mapping[str, Any], table: str, folder: Path = RESULTS) -> Path:
    """Write folder/NAME.json (machine, then payload) and folder/NAME.md (table, then machine); return the JSON path.

    Paths within the checkout are written from its root: where it lay is nobody's concern.
    """
    folder.mkdir(parents=True, exist_ok=True)
    machine = describe_machine()
    path = folder / f"{name}.json"
    text = json.dumps({"benchmark": name, "machine": machine, **payload}, indent=2)
    path.write_text(text.replace(f"{RESULTS.parents[1]}/", "") + "\n")
    where = f"{machine['cpu']}, {machine['cores']} cores, {machine['torch_threads']} torch threads"
    if machine["accelerator"]:
        where += f", {machine['accelerator']}"
    packages = ", ".join(f"{package} {number}" for package, number in machine["versions"].items())
    path.with_suffix(".md").write_text(f"# {name}\n\n{table}\n\nMeasured on: {where}. {packages}.\n")
    return path


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
