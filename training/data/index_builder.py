"""Measures every record once: on all cores of all ranks, resumable, reused as long as nothing it depends on changed.

Each source is cut into chunks of rows. A rank takes every world_size-th chunk, its processes write one Parquet part per
chunk under a temporary name and rename it, so that a part is either whole or absent. After a barrier rank 0 joins the
parts into `index.parquet`. A run that was killed finds its parts again.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import secrets
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from training.data.index import SCHEMA, Index, read_index
from training.data.prepare import Preparer, PrepareSettings
from training.data.quarantine import write_quarantine
from training.data.records import RecordError
from training.data.settings import SourceSettings
from training.data.sources import Source, open_sources

logger = logging.getLogger(__name__)

INDEX_VERSION = 1
"""Raise when the meaning of a column changes: older indexes are then built anew."""
CHUNK_ROWS = 128


@dataclass(frozen=True)
class IndexFolder:
    """Where one source's index lives: its name holds everything the content depends on."""

    path: Path

    @property
    def table(self) -> Path:
        return self.path / "index.parquet"

    def part(self, start: int) -> Path:
        return self.path / f"part-{start:010d}.parquet"


@dataclass(frozen=True)
class _Chunk:
    source: int
    start: int
    stop: int
    part: Path


def build_index(
    sources: Sequence[SourceSettings],
    prepare: PrepareSettings,
    *,
    index_dir: str = "",
    num_workers: int = 1,
    rank: int = 0,
    world_size: int = 1,
    barrier: Callable[[], None] = lambda: None,
    show_progress: bool = True,
) -> Index:
    """The index of all sources, built where it is missing. Every rank calls this and gets the same index.

    num_workers: processes of this rank; 0 measures in this process. barrier: waits for all ranks; called twice.
    Raises ValueError for unusable sources, an index_dir that cannot be written, or one that is not shared by all ranks.
    """
    opened = open_sources(sources)
    preparer = prepare.build()
    fingerprint = prepare.fingerprint(preparer)
    folders = [_folder(source, fingerprint, index_dir) for source in opened]
    missing = [number for number, folder in enumerate(folders) if not folder.table.exists()]
    chunks = [chunk for number in missing for chunk in _chunks(number, opened[number], folders[number])]
    mine = [chunk for chunk in chunks[rank::world_size] if not chunk.part.exists()]
    logger.info("index: %d of %d sources to measure, %d chunks on this rank", len(missing), len(opened), len(mine))
    _measure_all(mine, opened, prepare, preparer, num_workers, show_progress and rank == 0)
    barrier()
    if rank == 0:
        for number in missing:
            _join_parts(opened[number], folders[number])
    barrier()
    return read_index(opened, [folder.table for folder in folders])


def measure_row(preparer: Preparer, source: Source, row: int) -> dict:
    """One row of the index; a record that cannot be used comes back with its reason."""
    empty = {
        "content_hash": 0,
        "text_tokens": 0,
        "num_supervised": 0,
        "weight": 0.0,
        "kept_blocks": [],
        "full_blocks": [],
    }
    try:
        prepared = preparer.prepare(source.rows[row], source.root, record_format=source.settings.format)
    except RecordError as error:
        return {"row": row, "reason": error.reason, "detail": str(error)} | empty
    except Exception as error:
        error.add_note(f"while measuring {source.rows.where(row)}")
        raise
    sample = prepared.sample
    kept = [image.selection.num_kept for image in sample.images]
    return {
        "row": row,
        "reason": "",
        "detail": "",
        "content_hash": prepared.content_hash,
        "text_tokens": len(sample) - sum(kept),
        "num_supervised": sample.num_supervised,
        "weight": prepared.record.weight,
        "kept_blocks": kept,
        "full_blocks": [image.num_full_blocks for image in sample.images],
    }


def _folder(source: Source, fingerprint: dict, index_dir: str) -> IndexFolder:
    """The source's folder, made if need be, with the settings it stands for written into it."""
    settings = source.settings
    content = {
        "version": INDEX_VERSION,
        "data": source.fingerprint,
        "num_records": len(source),
        "root": settings.root,
        "format": settings.format,
        **fingerprint,
    }
    text = json.dumps(content, indent=2, sort_keys=True)
    path = Path(settings.path)
    beside = path.parent / f"{path.name}.index" if path.exists() else Path.home() / ".cache" / "pixelprune" / "index"
    folder = (Path(index_dir) / path.name if index_dir else beside) / xxhash.xxh3_64(text.encode()).hexdigest()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_atomically(folder / "settings.json", text + "\n")
    except OSError as error:
        raise ValueError(f"the index cannot be written to {folder}: {error.strerror} (data.index_dir)") from error
    return IndexFolder(folder)


def _chunks(number: int, source: Source, folder: IndexFolder) -> Iterator[_Chunk]:
    for start in range(0, len(source), CHUNK_ROWS):
        yield _Chunk(number, start, min(start + CHUNK_ROWS, len(source)), folder.part(start))


def _measure_all(
    chunks: list[_Chunk],
    sources: list[Source],
    prepare: PrepareSettings,
    preparer: Preparer,
    num_workers: int,
    show_progress: bool,
) -> None:
    columns = (TextColumn("index"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not show_progress or not chunks) as progress:
        task = progress.add_task("index", total=sum(chunk.stop - chunk.start for chunk in chunks))
        for num_rows in _measured(chunks, sources, prepare, preparer, num_workers):
            progress.advance(task, num_rows)


def _measured(
    chunks: list[_Chunk], sources: list[Source], prepare: PrepareSettings, preparer: Preparer, num_workers: int
) -> Iterator[int]:
    num_workers = min(num_workers, len(chunks))
    if num_workers <= 1:
        # A process more would cost its start (seconds) and save nothing.
        yield from (_write_part(chunk, sources, preparer) for chunk in chunks)
        return
    # Spawned, not forked: the parent has threads (tokenizers, numba, CUDA) that a fork would leave locked.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, context, _start_worker, (sources, prepare)) as pool:
        try:
            yield from pool.map(_work, chunks)
        except BrokenProcessPool as error:
            raise ValueError(
                "a process that measures records died, most likely for lack of memory: "
                f"use fewer than data.index_workers={num_workers}"
            ) from error


_worker: tuple[list[Source], Preparer] | None = None


def _start_worker(sources: list[Source], prepare: PrepareSettings) -> None:
    global _worker
    _worker = sources, prepare.build()


def _work(chunk: _Chunk) -> int:
    assert _worker is not None, "worker not started"
    return _write_part(chunk, *_worker)


def _write_part(chunk: _Chunk, sources: list[Source], preparer: Preparer) -> int:
    source = sources[chunk.source]
    rows = [measure_row(preparer, source, row) for row in range(chunk.start, chunk.stop)]
    partial = chunk.part.with_suffix(f".{secrets.token_hex(4)}.partial")
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), partial)
    partial.replace(chunk.part)
    return len(rows)


def _join_parts(source: Source, folder: IndexFolder) -> None:
    """Rank 0: parts -> index.parquet, then away with the parts."""
    parts = [folder.part(start) for start in range(0, len(source), CHUNK_ROWS)]
    try:
        table = pa.concat_tables([pq.read_table(part, schema=SCHEMA) for part in parts])
    except FileNotFoundError as error:
        if folder.table.exists():  # another run built the same index at the same time and was first
            return
        raise ValueError(
            f"parts of the index that other ranks measured are missing in {folder.path}; it must lie on a file system "
            "that all ranks share (data.index_dir)"
        ) from error
    assert len(table) == len(source), f"{len(table)} rows measured of {len(source)}"
    partial = folder.table.with_suffix(f".{secrets.token_hex(4)}.partial")
    pq.write_table(table, partial)
    partial.replace(folder.table)
    write_quarantine(folder.path / "quarantine.jsonl", read_index([source], [folder.table]).quarantined)
    for part in parts:
        part.unlink(missing_ok=True)


def _write_atomically(path: Path, text: str) -> None:
    partial = path.with_suffix(f".{secrets.token_hex(4)}.partial")
    partial.write_text(text)
    partial.replace(path)
