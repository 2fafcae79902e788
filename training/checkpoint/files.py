"""The files of one checkpoint: written beside, marked complete last, readable by any number of ranks.

checkpoints/step-00000120/
    state.json                      cursor, totals, run id, ...: everything that is not a tensor
    config.yaml, environment.json   what the run was: resolved recipe, versions, git state
    fragments-000-of-002.safetensors one per rank: its pieces of weights and moments
    random-000-of-002.safetensors    one per rank: generator states
    COMPLETE                        written when everything above is on disk: the hash of each file
While ranks write, hashes-000.json holds those of a rank's files; the first rank collects them into the marker.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from pixelprune.files import whole_file, write_whole
from training.checkpoint.proof import MARKER, hash_of_bytes, hash_of_tensors
from training.distributed.fragments import KINDS, Fragment
from training.errors import UserError

_NAME = re.compile(r"step-\d{8,}")


def checkpoint_folder(root: Path, step: int) -> Path:
    return root / f"step-{step:08d}"


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def complete_checkpoints(root: Path) -> list[Path]:
    """Folders that can be resumed from, oldest first."""
    return [folder for folder in _checkpoints(root) if (folder / MARKER).exists()]


def incomplete_checkpoints(root: Path) -> list[Path]:
    return [folder for folder in _checkpoints(root) if not (folder / MARKER).exists()]


def _checkpoints(root: Path) -> list[Path]:
    # Only names that a save gives: a user's copy `step-best` is none, and neither is one that was set aside as broken.
    return sorted((folder for folder in root.glob("step-*") if _NAME.fullmatch(folder.name)), key=step_of)


def set_aside(folder: Path) -> Path:
    """Rename a broken checkpoint, so that it is none any more and can be looked at; returns where it lies."""
    aside = folder.with_name(f"{folder.name}.broken")
    number = 1
    while aside.exists():
        number += 1
        aside = folder.with_name(f"{folder.name}.broken-{number}")
    return folder.rename(aside)


def write_bytes(path: Path, data: bytes) -> str:
    """The file exists whole or not at all. Returns the hash of its bytes."""
    write_whole(path, data)
    return hash_of_bytes(data)


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], header: dict[str, str]) -> str:
    """Contiguous tensors on the CPU as one file. Returns the hash of the bytes it should have."""
    with whole_file(path) as partial:
        save_file(tensors, partial, metadata=header)
        return hash_of_tensors(partial, tensors)


def hashes_file(folder: Path, rank: int) -> Path:
    """Written by a rank after all its other files: name -> hash of each."""
    return folder / f"hashes-{rank:03d}.json"


def fragment_file(folder: Path, rank: int, world_size: int) -> Path:
    return folder / f"fragments-{rank:03d}-of-{world_size:03d}.safetensors"


def random_file(folder: Path, rank: int, world_size: int) -> Path:
    return folder / f"random-{rank:03d}-of-{world_size:03d}.safetensors"


def failure_file(folder: Path, rank: int | str) -> Path:
    """Left by a rank that could not write its part."""
    return folder / f"failed-{rank if isinstance(rank, str) else f'{rank:03d}'}"


def write_fragments(path: Path, fragments: Iterable[Fragment]) -> str:
    """One file with the tensors `name:kind`; its header says where each piece begins and the parameter's shape.

    Returns the hash of the bytes it should have.
    """
    tensors, places = {}, {}
    for fragment in fragments:
        places[fragment.name] = {"start": fragment.start, "shape": fragment.shape}
        for kind, tensor in fragment.tensors.items():
            tensors[f"{fragment.name}:{kind}"] = tensor
    return write_tensors(path, tensors, {"places": json.dumps(places)})


class FragmentReader:
    """All pieces of a checkpoint, whatever number of ranks wrote them; tensors are read when asked for."""

    def __init__(self, folder: Path):
        self.folder = folder
        paths = sorted(folder.glob("fragments-*.safetensors"))
        world_size = json.loads((folder / "state.json").read_text())["world_size"]
        if len(paths) != world_size:
            raise UserError(
                f"{folder}: expected fragments of {world_size} ranks, found {len(paths)}; use another checkpoint"
            )
        self._files = [safe_open(path, framework="pt") for path in paths]
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._pieces: dict[str, list[tuple[int, int]]] = {}
        for number, file in enumerate(self._files):
            for name, place in json.loads(file.metadata()["places"]).items():
                self.shapes[name] = tuple(place["shape"])
                self._pieces.setdefault(name, []).append((place["start"], number))

    def read(self, name: str, kind: str, start: int = 0, length: int | None = None) -> torch.Tensor:
        """Elements [start, start + length) of a flattened parameter: float32 (length,), on the CPU.

        Raises UserError when the checkpoint does not hold them.
        """
        assert kind in KINDS, kind
        length = torch.Size(self.shapes.get(name, ())).numel() if length is None else length
        out = torch.empty(length)
        num_filled = 0
        for piece_start, number in self._pieces.get(name, []):
            piece = self._files[number].get_slice(f"{name}:{kind}")
            piece_len = piece.get_shape()[0]
            first, last = max(start, piece_start), min(start + length, piece_start + piece_len)
            if first < last:
                out[first - start : last - start] = piece[first - piece_start : last - piece_start]
                num_filled += last - first
        if num_filled != length or name not in self.shapes:
            raise UserError(
                f"{self.folder}: holds {num_filled} of {length} elements of {name} ({kind}); it is of another model or "
                "of other frozen parts: use its own recipe or a new run.name"
            )
        return out


def size_of(folder: Path) -> int:
    """Bytes of the folder's files, also while other ranks write and rename them."""
    total = 0
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def delete_checkpoint(folder: Path) -> None:
    """The marker goes first: a deletion that is cut short leaves an incomplete folder, never a broken complete one."""
    (folder / MARKER).unlink(missing_ok=True)
    shutil.rmtree(folder)
