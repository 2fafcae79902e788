"""Where the index of a source lives: a folder whose name holds everything its content depends on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import xxhash

from pixelprune.files import write_whole
from pixelprune.records.presets import AS_RECORDED
from training.data.files.address import is_remote
from training.data.files.unpacked import home_of_index, side_folder
from training.data.sources import Source
from training.errors import UserError

INDEX_VERSION = 8
"""Raise when the meaning of a column, or what can be used, changes: older indexes are then built anew."""


@dataclass(frozen=True)
class IndexFolder:
    """One source's index."""

    path: Path

    @property
    def table(self) -> Path:
        return self.path / "index.parquet"

    def part(self, start: int) -> Path:
        return self.path / f"part-{start:010d}.parquet"


def open_folder(source: Source, fingerprint: dict, index_dir: str) -> IndexFolder:
    """The source's folder; where it has no index yet, made if need be, with the settings it stands for written into it.

    fingerprint: what records are prepared with. index_dir: keeps the indexes of all sources; "" for beside each.
    Raises ValueError when the folder cannot be written.
    """
    settings = source.settings
    content = {
        "version": INDEX_VERSION,
        "data": source.fingerprint,
        "num_records": len(source),
        "root": settings.root,
        "format": settings.format,
        **({} if (preset := settings.preset()) == AS_RECORDED else {"prompt": vars(preset)}),
        **fingerprint,
    }
    path = Path(settings.path)
    if path.exists() and not index_dir:
        parent = side_folder(path, "")
    else:
        # A folder for many sources: two data files of one name, size and time may have other images beside them.
        content["path"] = str(path.resolve()) if path.exists() else settings.path
        is_local = settings.root and not is_remote(settings.root)
        content["root"] = str(Path(settings.root).resolve()) if is_local else settings.root
        parent = home_of_index(path, index_dir)
    text = json.dumps(content, indent=2, sort_keys=True)
    folder = IndexFolder(parent / xxhash.xxh3_64(text.encode()).hexdigest())
    if folder.table.exists():  # it may lie on a read-only file system
        return folder
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        write_whole(folder.path / "settings.json", f"{text}\n".encode(), is_shared=True)
    except OSError as error:
        raise ValueError(f"the index cannot be written to {folder.path}: {error.strerror} (data.index_dir)") from error
    return folder


@contextmanager
def index_writes(path: Path) -> Iterator[None]:
    """No run goes on without its index: UserError, also from another process."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path}: the index cannot be written: {error.strerror or error} (free space, or keep indexes elsewhere: "
            "data.index_dir)"
        ) from error
