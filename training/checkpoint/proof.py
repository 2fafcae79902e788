"""The proof that a checkpoint is whole: a hash of every file, kept in its marker and compared when it is read.

xxh3-128 finds what disks, networks and memory do to bits; it is no protection against an attacker. The hash of a file
of tensors is taken from the tensors in memory, not from the file: what went wrong on the way to the disk shows too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import xxhash

MARKER = "COMPLETE"
_READ_BYTES = 8 << 20


def hash_of_bytes(data: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(data)


def hash_of_file(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while data := file.read(_READ_BYTES):
            digest.update(data)
    return digest.hexdigest()


def hash_of_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> str:
    """The hash that the safetensors file `path` has if it holds exactly these contiguous tensors (on the CPU)."""
    with path.open("rb") as file:
        length = file.read(8)
        header = file.read(int.from_bytes(length, "little"))
    digest = xxhash.xxh3_128(length + header)
    places = {name: place["data_offsets"] for name, place in json.loads(header).items() if name != "__metadata__"}
    for name in sorted(places, key=lambda name: places[name][0]):
        digest.update(memoryview(tensors[name].reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


def marker_text(hashes: dict[str, str]) -> str:
    """The marker's content. hashes: file name -> xxh3-128, of all files of the checkpoint."""
    return json.dumps({"xxh3_128": dict(sorted(hashes.items()))}, indent=1)


def read_marker(folder: Path) -> dict[str, str] | None:
    """File name -> hash; None for a checkpoint of an earlier version, whose marker is empty. ValueError if damaged."""
    text = (folder / MARKER).read_bytes()
    if not text:
        return None
    content: Any = json.loads(text)
    hashes = content.get("xxh3_128") if isinstance(content, dict) else None
    if not isinstance(hashes, dict) or not all(isinstance(value, str) for value in hashes.values()):
        raise ValueError("no hashes in it")
    return hashes


def what_is_broken(folder: Path, *, part: int = 0, num_parts: int = 1) -> list[str]:
    """What of a checkpoint is not as it was written, one line each; empty if it is whole.

    part, num_parts: looks at the files part, part + num_parts, ...: ranks share the reading.
    A checkpoint without hashes (of an earlier version) cannot be checked: empty.
    """
    try:
        hashes = read_marker(folder)
    except (OSError, ValueError) as error:
        return [f"{MARKER}: {error}"]
    return [] if hashes is None else _differences(folder, sorted(hashes.items())[part::num_parts])


def _differences(folder: Path, hashes: Iterable[tuple[str, str]]) -> list[str]:
    lines = []
    for name, expected in hashes:
        try:
            found = hash_of_file(folder / name)
        except OSError as error:
            lines.append(f"{name}: {error.strerror or error}")
        else:
            if found != expected:
                lines.append(f"{name}: its bytes are not those that were written (xxh3-128 {found}, {expected})")
    return lines
