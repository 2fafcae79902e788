"""Weights from file to file: a model folder's safetensors by name, and sharded writing with bounded memory."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from training.errors import UserError

WHOLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


def weight_paths(folder: Path) -> list[Path]:
    """The safetensors files that `from_pretrained` would read: one file before shards, whatever else lies there.

    Saving one file over shards leaves the old index, and saving shards over one file leaves that. Raises UserError.
    """
    whole, index = folder / WHOLE_FILE, folder / INDEX_FILE
    if whole.exists():
        return [whole]
    if not index.exists():
        raise UserError(f"{folder}: expected weights in {WHOLE_FILE} or shards named by {INDEX_FILE}, found neither")
    paths = [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    if missing := [path.name for path in paths if not path.exists()]:
        raise UserError(f"{folder}: {INDEX_FILE} names {missing[0]}, which is not there")
    return paths


class TensorFiles:
    """The tensors of a model folder; each is read when it is asked for. A context manager."""

    def __init__(self, folder: Path):
        """Raises UserError when the folder holds no safetensors, or damaged ones."""
        self.folder = folder
        try:
            self._files = [safe_open(path, "pt") for path in weight_paths(folder)]
        except (OSError, SafetensorError) as error:
            raise UserError(f"{folder}: its weights cannot be read: {error}") from error
        self._where = {name: file for file in self._files for name in file.keys()}  # noqa: SIM118 (not a dict)

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files:
            file.__exit__(kind, error, trace)

    @property
    def names(self) -> list[str]:
        return sorted(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._where[name].get_slice(name).get_shape())

    def read(self, name: str) -> torch.Tensor:
        return self._where[name].get_tensor(name)

    def rows(self, name: str, rows: list[int]) -> torch.Tensor:
        """Some rows of a matrix, without reading the others."""
        part: Any = self._where[name].get_slice(name)
        return torch.cat([part[row : row + 1] for row in rows])


def write_shards(folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], max_shard_bytes: int) -> int:
    """Write named tensors as safetensors of about `max_shard_bytes`, holding one shard in memory; returns all bytes."""
    shards: list[list[str]] = []
    held: dict[str, torch.Tensor] = {}
    held_bytes = total = 0

    def flush() -> None:
        save_file(held, folder / f"shard-{len(shards)}.safetensors", metadata={"format": "pt"})
        shards.append(list(held))
        held.clear()

    for name, tensor in tensors:
        num_bytes = tensor.numel() * tensor.element_size()
        if held and held_bytes + num_bytes > max_shard_bytes:
            flush()
            held_bytes = 0
        held[name] = tensor.contiguous()
        held_bytes += num_bytes
        total += num_bytes
    flush()
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        final = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else WHOLE_FILE
        (folder / f"shard-{number}.safetensors").rename(folder / final)
        weight_map |= dict.fromkeys(names, final)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
    return total
