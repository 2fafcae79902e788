"""Measures every record once: on all cores of all ranks, resumable, reused as long as nothing it depends on changed.

Each source is cut into chunks of rows. A rank takes every world_size-th chunk, its processes write one Parquet part per
chunk under a temporary name and rename it, so that a part is either whole or absent. After a barrier rank 0 joins the
parts into `index.parquet`. A run that was killed finds its parts again. In an index that is reused, rank 0 measures
again what was quarantined for an image file: the file may have been fixed since. A record has a time limit.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from pixelprune.command import ProgressLine
from pixelprune.files import whole_file
from pixelprune.records.prepare import Preparer, PrepareSettings
from pixelprune.records.reader import parse_record
from pixelprune.records.record import OUT_OF_MEMORY, UNEXPECTED
from pixelprune.sessions.pruning import Shot, prune_shots
from pixelprune.text.steps import Steps
from training.data.columns import refuse_unread_columns
from training.data.index import SCHEMA, Index, read_index
from training.data.index_folder import IndexFolder, index_writes, open_folder
from training.data.measuring.pictures import MeasuredPictures, forget_pictures
from training.data.measuring.pool import TOO_SLOW, Chunk, MeasuringPool, too_slow
from training.data.measuring.row import Row, measured_rows, row_steps, unmeasured
from training.data.quarantine import write_quarantine
from training.data.settings import SourceSettings
from training.data.sources import Source, open_sources
from training.errors import StopAskedError, UserError

logger = logging.getLogger(__name__)

RowSteps = Callable[[Preparer, Source, int, MeasuredPictures], Steps[Row]]

CHUNK_ROWS = 128
MOST_PARTS = 1024
"""Of a source: above it, parts of 128 rows cost more than their rows, to write and to look through at a start."""
PERHAPS_NOT_ITS_OWN = (UNEXPECTED, OUT_OF_MEMORY)
"""What may lie in the program or the machine: tried again at every start."""
REPAIRABLE = (
    "missing_file", "unreadable_file", "empty_file", "file_too_large", "outside_root", "not_an_image",
    "truncated_image", "unsupported_mode", "decompression_bomb", "aspect_ratio", "place_outside", "turned_image",
)  # fmt: skip
"""Reasons that lie in an image file, which may be fixed while the data file and so the index folder stay the same."""


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
    recheck: bool = True,
    is_stopped: Callable[[], bool] = lambda: False,
    any_rank: Callable[[bool], bool] = bool,
    max_seconds: float = 0.0,
) -> Index:
    """The index of all sources, built where it is missing. Every rank calls this and gets the same index.

    num_workers: processes of this rank; 0 measures in this process. barrier: waits for all ranks; called twice.
    recheck: measure again what an index that is reused has quarantined for an image file.
    is_stopped: asked after every chunk. any_rank: whether a flag is set on any rank; called once by every rank.
    max_seconds: that one record may take, 0 for any time; it takes processes of our own to keep it.
    Raises ValueError for unusable sources, columns of a table that are not read, an index_dir that cannot be written,
    or one that is not shared by all ranks.
    """
    opened = open_sources(sources, index_dir)
    prepare = replace(prepare, with_full=False)
    preparer = prepare.build()
    for source in opened:
        refuse_unread_columns(source, preparer.rules)
    fingerprint = prepare.fingerprint(preparer)
    folders = [open_folder(source, fingerprint, index_dir) for source in opened]
    missing = [n for n, folder in enumerate(folders) if not _is_whole(folder.table, len(opened[n]))]
    # Assigned source by source: a source that another run completes meanwhile is missing to some ranks only.
    mine = [
        chunk
        for number in missing
        for i, chunk in enumerate(_chunks(number, opened[number], folders[number]), start=number)
        if i % world_size == rank and not (chunk.part and _is_whole(chunk.part, len(chunk.rows)))
    ]
    num_records, num_missing = sum(map(len, opened)), sum(len(opened[number]) for number in missing)
    if missing:
        sources_of = "1 source" if len(missing) == 1 else f"{len(missing)} sources"
        shared = f"; {world_size} ranks share them, the bar is the first one's" if world_size > 1 else ""
        logger.info("index: measuring %d records of %s, once%s", num_missing, sources_of, shared)
    if num_records > num_missing:
        logger.info("index: %d records are as they were measured before", num_records - num_missing)
    pool = _Pool(opened, prepare, preparer, num_workers, max_seconds, show_progress and rank == 0, is_stopped)
    pool.measure(mine)
    barrier()
    if any_rank(is_stopped()):
        raise StopAskedError
    try:
        if rank == 0:
            for number in missing:
                _join_parts(opened[number], folders[number])
            if recheck:
                _recheck([n for n in range(len(opened)) if n not in missing], folders, pool)
    finally:
        barrier()  # also when rank 0 failed: the others would wait here until their time is out
    for number in missing:
        folder = folders[number]
        if not _is_whole(folder.table, len(opened[number])):
            raise ValueError(
                f"parts of the index that other ranks measured are missing in {folder.path}; it must lie on a file "
                "system that all ranks share (data.index_dir)"
            )
    return read_index(opened, [folder.table for folder in folders])


def _chunks(number: int, source: Source, folder: IndexFolder) -> Iterator[Chunk]:
    for rows in _rows_of_parts(len(source)):
        yield Chunk(number, rows, folder.part(rows.start))


def _rows_of_parts(num_rows: int) -> list[range]:
    size = max(CHUNK_ROWS, -(-num_rows // MOST_PARTS))
    return [range(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]


@dataclass(frozen=True)
class _Pool:
    """What measures chunks: this process, or several."""

    sources: list[Source]
    prepare: PrepareSettings
    preparer: Preparer
    num_workers: int
    max_seconds: float
    show_progress: bool
    is_stopped: Callable[[], bool]

    @property
    def limits_time(self) -> bool:
        return bool(self.max_seconds and self.num_workers)

    def measure(self, chunks: list[Chunk]) -> list[dict]:
        """Write the parts; returns the rows, in order, of the chunks that have none. Ends early when stopped."""
        handed_back: dict[int, list[dict]] = {}
        if chunks and self.max_seconds and not self.num_workers:
            logger.warning(
                "records are measured in this process, which cannot end one that takes longer than "
                "data.max_seconds_per_record=%g",
                self.max_seconds,
            )
        with ProgressLine("index", sum(len(chunk.rows) for chunk in chunks), is_shown=self.show_progress) as progress:
            for number, rows in self._results(chunks):
                handed_back[number] = rows
                progress.advance(len(chunks[number].rows))
                if self.is_stopped():
                    break
        # Stopped early, chunks behind one that is missing are done again.
        in_order = itertools.takewhile(handed_back.__contains__, range(len(chunks)))
        return [row for number in in_order for row in handed_back[number]]

    def _results(self, chunks: list[Chunk]) -> Iterator[tuple[int, list[dict]]]:
        num_workers = min(self.num_workers, len(chunks))
        if num_workers <= 1 and not (num_workers and self.max_seconds):
            # A process more would cost its start (seconds) and save nothing.
            measurer = _Measurer(self.sources, self.preparer)
            for number, chunk in enumerate(chunks):
                yield number, measurer.finish(chunk, list(measurer.measure(chunk, chunk.rows)))
            return
        start = partial(_start_worker, self.sources, self.prepare, row_steps)
        yield from MeasuringPool(start, unmeasured, num_workers, self.max_seconds, self.is_stopped).measure(chunks)


class _Measurer:
    """What measures the rows of chunks in one process."""

    def __init__(self, sources: list[Source], preparer: Preparer, steps_of: RowSteps | None = None):
        self.sources, self.preparer = sources, preparer
        self._steps_of = steps_of or row_steps
        self._pictures: dict[Path | None, MeasuredPictures] = {}

    def measure(
        self, chunk: Chunk, rows: Sequence[int], begin: Callable[[int], None] = lambda row: None
    ) -> Iterator[Row]:
        """Those rows of the chunk, in order. begin: as of `measured_rows`."""
        source, folder = self.sources[chunk.source], chunk.part.parent if chunk.part else None
        pictures = self._pictures.setdefault(folder, MeasuredPictures(folder))
        pictures.look_around()
        return measured_rows(lambda row: self._steps_of(self.preparer, source, row, pictures), rows, begin)

    def finish(self, chunk: Chunk, rows: list[Row]) -> list[Row]:
        """The part written, or the rows of a chunk that has none."""
        if chunk.part is None:
            return rows
        _write_table(chunk.part, pa.Table.from_pylist(rows, schema=SCHEMA))
        return []


def _start_worker(sources: list[Source], prepare: PrepareSettings, steps_of: RowSteps) -> _Measurer:
    preparer = prepare.build()
    # The kernels are compiled, or read from their cache, with the first picture, which is no record's fault.
    prune_shots([Shot(Image.new("RGB", (70, 70)))] * 2, preparer.prune, prepare.resize)
    return _Measurer(sources, preparer, steps_of)


def _is_whole(path: Path, num_rows: int) -> bool:
    """Whether a table is there to its last row. A power cut leaves files that are cut, or zeros for pages that never
    came."""
    try:
        if pq.read_table(path, schema=SCHEMA, page_checksum_verification=True).num_rows == num_rows:
            return True
        problem: object = f"expected {num_rows} rows"
    except FileNotFoundError:
        return False
    except (OSError, pa.ArrowException) as error:
        problem = str(error).splitlines()[0]
    logger.warning("%s is damaged and measured again: %s", path, problem)
    return False


def _join_parts(source: Source, folder: IndexFolder) -> None:
    """Rank 0: parts -> index.parquet, then away with the parts. Without all of them nothing is written."""
    parts = [folder.part(rows.start) for rows in _rows_of_parts(len(source))]
    try:
        table = pa.concat_tables([pq.read_table(part, schema=SCHEMA) for part in parts])
    except (OSError, pa.ArrowException):
        # Another run built the same index at the same time and was first, or ranks do not share the folder.
        return
    _write_index(source, folder, table)
    for part in parts:
        part.unlink(missing_ok=True)
    forget_pictures(folder.path)


def _recheck(numbers: Sequence[int], folders: list[IndexFolder], pool: _Pool) -> None:
    """Rank 0: measure again what these sources' indexes refuse for an image file, for an error that nobody expected, or
    for another time limit than today's; replace the rows that changed."""
    before: dict[int, dict[int, tuple[str, str]]] = {}
    for number in numbers:
        again = pc.field("reason").isin((*REPAIRABLE, *PERHAPS_NOT_ITS_OWN, TOO_SLOW))
        entries = pq.read_table(folders[number].table, columns=["row", "reason", "detail"], filters=again).to_pylist()
        source = pool.sources[number]
        before[number] = {
            e["row"]: (e["reason"], e["detail"])
            for e in entries
            if (
                pool.limits_time and e["detail"] != too_slow(pool.max_seconds)
                if e["reason"] == TOO_SLOW
                else e["reason"] in PERHAPS_NOT_ITS_OWN or _reads_files(source, e["row"], pool.preparer)
            )
        }
    chunks = [
        Chunk(number, rows[start : start + CHUNK_ROWS])
        for number, known in before.items()
        for rows in [sorted(known)]
        for start in range(0, len(rows), CHUNK_ROWS)
    ]
    measured = iter(pool.measure(chunks))
    for number, known in before.items():
        new = itertools.islice(measured, len(known))
        changed = [row for row in new if (row["reason"], row["detail"]) != known[row["row"]]]
        if changed:
            _replace_rows(pool.sources[number], folders[number], changed)


def _reads_files(source: Source, row: int, preparer: Preparer) -> bool:
    """Whether an image of the record is a file; one inside the data file cannot change without it."""
    record = parse_record(source.rows[row], source.settings.format, preparer.rules)
    return any(isinstance(ref.source, str) for ref in record.images)


def _replace_rows(source: Source, folder: IndexFolder, rows: list[dict]) -> None:
    table = pq.read_table(folder.table, schema=SCHEMA)
    others = table.filter(~pc.field("row").isin([row["row"] for row in rows]))
    joined = pa.concat_tables([others, pa.Table.from_pylist(rows, schema=SCHEMA)]).sort_by("row")
    num_fixed = sum(not row["reason"] for row in rows)
    try:
        _write_index(source, folder, joined)
    except UserError as error:  # a complete index may lie on a read-only file system
        logger.warning("%d records that can be used now stay out: %s", num_fixed, error)
        return
    logger.warning(
        "%s: %d records whose images were fixed, or whose error is gone, can be used now", source.name, num_fixed
    )


def _write_index(source: Source, folder: IndexFolder, table: pa.Table) -> None:
    assert len(table) == len(source), f"{len(table)} rows measured of {len(source)}"
    _write_table(folder.table, table)
    with index_writes(folder.path / "quarantine.jsonl"):
        write_quarantine(folder.path / "quarantine.jsonl", read_index([source], [folder.table]).quarantined)


def _write_table(path: Path, table: pa.Table) -> None:
    with index_writes(path), whole_file(path, is_shared=True) as partial:
        pq.write_table(table, partial, write_page_checksum=True)
