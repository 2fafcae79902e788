"""A benchmark's Parquet files from the hub: rows as entries, pictures as files beside the records.

The `datasets` library stores a picture as a struct of `bytes` (the file as it was) and `path` (its name, often empty).
The other columns are those that the published files have, partly under other names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from data_tools.convert.dropped import DropError
from data_tools.convert.image_files import ImageFiles

SUFFIX = ".parquet"
IMAGE = "image"
_ROWS_AT_ONCE = 16


def hub_rows(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """(row, bytes of the file read so far). Raises ValueError for a file that is no Parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    size, num_read = path.stat().st_size, 0
    try:
        file = pq.ParquetFile(path)
        for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE):
            for row in batch.to_pylist():
                num_read += 1
                yield row, size * num_read // file.metadata.num_rows
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: damaged, or no Parquet file: {error}") from error


def hub_entries(path: Path, images: ImageFiles, names: Mapping[str, str]) -> Iterator[tuple[Any, int]]:
    """Rows under the published files' names, the picture by its file's name.

    names: column -> the field of the published files; others keep theirs. The picture's own is under "image". What it
    is that keeps a row without a picture stands in its place, as the DropError that the reader raises.
    """
    for number, (row, position) in enumerate(hub_rows(path)):
        entry = {names.get(key, key): value for key, value in row.items() if key != IMAGE}
        try:
            entry[names.get(IMAGE, IMAGE)] = picture_name(row.get(IMAGE), images, f"{path.stem}/{number:06d}")
        except DropError as error:
            entry = {"error": error}
        yield entry, position


def picture_name(cell: Any, images: ImageFiles, stem: str) -> str:
    """The file of a picture: written from its bytes under `stem`, or the one that its path names. Raises DropError."""
    data, name = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (None, cell)
    if isinstance(data, bytes):
        return images.add(stem, data)
    if not isinstance(name, str) or not name:
        raise DropError("image has neither bytes nor a path")
    return name
