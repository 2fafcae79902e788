"""What a teacher said about each record, on disk: memory-mapped safetensors shards, found by the record's content.

    M = supervised tokens of all records of a shard, D = the teacher's width, k = entries of a top-k cache

A shard holds `content_hash` int64 (n,), `labels_hash` int64 (n,), `starts` int64 (n + 1,): record i owns the rows
starts[i] to starts[i + 1] of `hidden` (M, D), or of `log_probs` float32 (M, k) and `ids` int32 (M, k). The content hash
covers text, roles, turn weights, image bytes and stated sizes, so that entries survive reordering and renaming of data
files; what else a target depends on is in the name of the folder (`training.teacher.files`).
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import save_file

from pixelprune.files import whole_file
from training.data.files.mapped_file import MappedFile
from training.errors import UserError

_LOOKUP = ("content_hash", "labels_hash", "starts")
BUILD_ADVICE = "build them with `python -m training.cache_teacher RECIPE` and the same settings"


class TargetEntry(NamedTuple):
    """One record's targets: values by name, (num_supervised, ...) each."""

    content_hash: int
    labels: np.ndarray
    values: dict[str, torch.Tensor]


class TargetReader:
    """Random access to all shards of a folder. Picklable: every process maps the files again.

    vocab_size: the student's, which the token ids of a top-k cache must lie in; without it they are not read.
    """

    def __init__(self, folder: Path, vocab_size: int | None = None):
        self.folder, self.vocab_size = folder, vocab_size
        self._table: _Table | None = None

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_table": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)

    def has(self, content_hash: np.ndarray) -> np.ndarray:
        """bool, the shape of `content_hash`: which records have an entry."""
        return np.isin(content_hash, self._lookup().content_hash)

    def __len__(self) -> int:
        return len(self._lookup().content_hash)

    def read(self, content_hash: int, labels: np.ndarray, record_id: str) -> dict[str, torch.Tensor]:
        """Values of one record by name, (num_supervised, ...) each, in the order of its supervised tokens.

        Raises UserError when there is no entry, when it was made for other supervised tokens than `labels`, or when
        its shard is damaged or has become shorter.
        """
        table = self._lookup()
        place = int(np.searchsorted(table.content_hash, content_hash))
        if place == len(table.content_hash) or table.content_hash[place] != content_hash:
            raise UserError(f"record {record_id!r} has no teacher targets in {self.folder}; {BUILD_ADVICE}")
        start, stop = int(table.start[place]), int(table.stop[place])
        if stop - start != len(labels) or table.labels_hash[place] != hash_labels(labels):
            raise UserError(
                f"record {record_id!r}: the teacher targets in {self.folder} belong to other supervised tokens "
                f"({stop - start} of them, the record has {len(labels)}); delete that folder and {BUILD_ADVICE}"
            )
        path = table.shards[table.shard[place]]
        shard = _open_shard(path)
        values = {name: shard.get_slice(name)[start:stop] for name in table.names}
        for name, value in values.items():
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise _damaged(path, f"{name} of record {record_id!r} holds values that are no numbers")
        if "ids" in values and len(ids := values["ids"]):
            self._check_ids(path, ids, record_id)
        return values

    def _check_ids(self, path: Path, ids: torch.Tensor, record_id: str) -> None:
        assert self.vocab_size is not None, "a top-k cache is read by who knows the vocabulary"
        lowest, highest = (int(value) for value in ids.aminmax())
        if lowest < 0 or highest >= self.vocab_size:
            raise _damaged(
                path,
                f"token ids of record {record_id!r} run from {lowest} to {highest}, expected 0 to "
                f"{self.vocab_size - 1}",
            )

    def empty(self) -> dict[str, torch.Tensor]:
        """Values of no record at all, in the shapes and types of the others."""
        table = self._lookup()
        shard = _open_shard(table.shards[0])
        return {name: shard.get_slice(name)[0:0] for name in table.names}

    def _lookup(self) -> _Table:
        if self._table is None:
            self._table = _read_table(self.folder)
        return self._table


class _Table(NamedTuple):
    """All entries, sorted by content hash."""

    shards: list[Path]
    names: tuple[str, ...]
    content_hash: np.ndarray
    labels_hash: np.ndarray
    shard: np.ndarray
    start: np.ndarray
    stop: np.ndarray


def write_shard(folder: Path, entries: list[TargetEntry]) -> Path:
    """Write one shard, whole or not at all; its name follows from the records in it."""
    content_hash = np.array([entry.content_hash for entry in entries], dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum([len(entry.labels) for entry in entries])])
    tensors = {
        "content_hash": torch.from_numpy(content_hash),
        "labels_hash": torch.tensor([hash_labels(entry.labels) for entry in entries], dtype=torch.int64),
        "starts": torch.from_numpy(starts.astype(np.int64)),
    }
    for name in entries[0].values:
        tensors[name] = torch.cat([entry.values[name] for entry in entries]).contiguous()
    path = folder / f"shard-{xxhash.xxh3_64(content_hash.tobytes()).hexdigest()}.safetensors"
    with whole_file(path) as partial:
        save_file(tensors, partial)
        partial.chmod(0o644)  # safetensors writes files that only their owner can read
    return path


def hash_labels(labels: np.ndarray) -> int:
    """63-bit hash of supervised token ids, in order."""
    return xxhash.xxh3_64(np.ascontiguousarray(labels, dtype=np.int64).tobytes()).intdigest() >> 1


def _read_table(folder: Path) -> _Table:
    shards = sorted(folder.glob("shard-*.safetensors"))
    columns: dict[str, list[np.ndarray]] = {
        name: [] for name in ("content_hash", "labels_hash", "shard", "start", "stop")
    }
    names: tuple[str, ...] = ()
    for number, path in enumerate(shards):
        shard = _open_shard(path)
        if missing := sorted(set(_LOOKUP) - set(shard.keys())):
            raise _damaged(path, f"without {', '.join(missing)}")
        content_hash, labels_hash, starts = (shard.get_tensor(name).numpy() for name in _LOOKUP)
        names = tuple(sorted(set(shard.keys()) - set(_LOOKUP)))
        _check_starts(path, shard, starts, len(content_hash), names)
        columns["content_hash"].append(content_hash)
        columns["labels_hash"].append(labels_hash)
        columns["shard"].append(np.full(len(content_hash), number))
        columns["start"].append(starts[:-1])
        columns["stop"].append(starts[1:])
    joined = {name: np.concatenate([np.empty(0, dtype=np.int64), *parts]) for name, parts in columns.items()}
    order = np.argsort(joined["content_hash"], kind="stable")
    return _Table(shards, names, **{name: values[order] for name, values in joined.items()})


def _open_shard(path: Path) -> Any:
    """The mapped file, still as long as it was."""
    file, shard = _mapped_shard(path)
    file.check()
    return shard


@lru_cache(maxsize=256)
def _mapped_shard(path: Path) -> tuple[MappedFile, Any]:
    """A process keeps the last 256 mapped."""
    try:
        return MappedFile(path), safe_open(path, framework="pt")
    except Exception as error:  # safetensors raises its own error class, and others, for damaged files
        raise _damaged(path, str(error)) from error


def _check_starts(path: Path, shard: Any, starts: np.ndarray, num_entries: int, names: tuple[str, ...]) -> None:
    """UserError unless the entries lie one behind the other and end where the values do."""
    num_tokens = {shard.get_slice(name).get_shape()[0] for name in names}
    is_in_order = len(starts) == num_entries + 1 and starts[0] == 0 and bool((np.diff(starts) >= 0).all())
    if not is_in_order or num_tokens != {int(starts[-1])}:
        raise _damaged(path, f"its {num_entries} entries do not cover the {sorted(num_tokens)} tokens of their values")


def _damaged(path: Path, what: str) -> UserError:
    return UserError(f"{path}: not a readable shard of teacher targets ({what}); delete it and {BUILD_ADVICE}")
