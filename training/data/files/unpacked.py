"""Compressed text files, unpacked once beside the index: a record is read by its place, which no stream has.

The unpacked file bears a name made of what the compressed one is (path, size, time), so that a changed file is unpacked
anew. One process of a machine or of a shared file system does it; the others wait for it.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any, BinaryIO

import pyarrow as pa
import xxhash

from pixelprune.files import whole_file
from training.data.files.json_rows import MAX_RECORD_BYTES

__all__ = ["COMPRESSIONS", "home_of_index", "one_at_a_time", "side_folder", "unpacked"]

logger = logging.getLogger(__name__)

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
CHUNK_BYTES = 1 << 20


def side_folder(path: Path, index_dir: str) -> Path:
    """Where what is made of a data file or folder is kept: its indexes, and what was unpacked of it."""
    return Path(index_dir) / path.name if index_dir else path.parent / f"{path.name}.index"


def home_of_index(path: PurePath, index_dir: str) -> Path:
    """The same for what is no local file: below `index_dir`, or the user's cache."""
    return Path(index_dir) / path.name if index_dir else Path.home() / ".cache" / "pixelprune" / "index"


def unpacked(path: Path, folder: Path, *, has_lines: bool) -> Path:
    """The unpacked file of a compressed one, made in `folder` where it is missing.

    has_lines: the text holds a record a line, each at most MAX_RECORD_BYTES long; what a longer one has beyond that
    is not written, so that its record alone is refused.
    Raises ValueError for a damaged file, and where the folder cannot be written or is full.
    """
    stat = path.stat()
    key = xxhash.xxh3_64(repr((str(path.resolve()), stat.st_size, stat.st_mtime_ns)).encode()).hexdigest()
    inner = Path(path.stem).suffix.lower()
    made = folder / "unpacked" / f"{key}{inner}"
    if made.exists():
        return made
    try:
        made.parent.mkdir(parents=True, exist_ok=True)
        with one_at_a_time(made.with_suffix(".lock")):
            if not made.exists():
                logger.info("unpacking %s to %s", path, made)
                with whole_file(made, is_shared=True) as partial, partial.open("wb") as out:
                    _unpack(path, out, MAX_RECORD_BYTES if has_lines else None)
    except OSError as error:
        raise ValueError(
            f"source {path}: cannot be unpacked to {made.parent}: {error.strerror or error} "
            "(data.index_dir names another place)"
        ) from error
    return made


def _unpack(path: Path, out: BinaryIO, max_line: int | None) -> None:
    with pa.memory_map(str(path)) as packed:
        try:
            stream: Any = pa.CompressedInputStream(packed, COMPRESSIONS[path.suffix.lower()])
        except OSError as error:
            raise ValueError(f"source {path}: cannot be unpacked: {error} (sources[].path)") from error
        line_len = 0
        while chunk := _next_chunk(stream, path):
            if max_line is None:
                out.write(chunk)
                continue
            for piece in _lines(chunk):
                ends = piece.endswith(b"\n")
                # One byte above the cap tells the reader that the line was longer.
                out.write(piece[: max(max_line + 1 - line_len, 0)])
                if ends and line_len + len(piece) > max_line + 1:
                    out.write(b"\n")
                line_len = 0 if ends else line_len + len(piece)


def _next_chunk(stream: Any, path: Path) -> bytes:
    try:
        return stream.read(CHUNK_BYTES)
    except OSError as error:
        raise ValueError(
            f"source {path}: damaged, or no {COMPRESSIONS[path.suffix.lower()]} file: {error} (sources[].path)"
        ) from error


def _lines(chunk: bytes) -> Iterator[bytes]:
    """Pieces that end with a line feed; a carriage return alone ends no line."""
    start = 0
    while start < len(chunk):
        end = chunk.find(b"\n", start) + 1 or len(chunk)
        yield chunk[start:end]
        start = end


@contextlib.contextmanager
def one_at_a_time(lock: Path) -> Iterator[None]:
    """One process in here at a time, of all that name the same lock file; the others wait."""
    with lock.open("wb") as file:
        # A file system without locks: every process unpacks for itself, and the last one's file stays.
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
