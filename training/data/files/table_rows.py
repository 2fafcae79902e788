"""Rows of tables, read as Arrow so that images stay encoded until a worker decodes them."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pixelprune.records.record import of_the_record
from training.data.files.mapped_file import MappedFile
from training.errors import UserError

__all__ = ["ArrowFileRows", "ArrowRows"]

_FILE_MAGIC = b"ARROW1"


class ArrowRows:
    """Rows of a `datasets.Dataset`: Parquet, saved data sets, the hub.

    Picklable: a worker maps the files again, when it is asked for a row.
    """

    def __init__(self, dataset: Any, origin: str):
        self._dataset = dataset.with_format("arrow")
        self._pickled = b""
        self.origin = origin
        parts = list(_mapped_parts(dataset.data))
        if dataset._indices is not None:  # a view: any row may stand in any file
            parts = [(len(dataset), [file for _, files in parts for file in files])]
        self._files = [files for _, files in parts]
        self._starts = _starts([num_rows for num_rows, _ in parts])

    @property
    def table(self) -> Any:
        """Columns by name, in chunks."""
        return self._opened().data

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, row: int) -> Any:
        """Raises RecordError for a row that Python cannot hold: no valid Unicode, a date too far; UserError for a file
        that has become shorter."""
        for file in self._files[_part_of(row, self._starts)]:
            file.check()
        dataset = self._opened()
        with of_the_record():
            return dataset[int(row)].to_pylist()[0]

    def where(self, row: int) -> str:
        return f"{self.origin}, row {row}"

    def _opened(self) -> Any:
        if self._dataset is None:
            try:
                self._dataset = pickle.loads(self._pickled)
            except (pa.ArrowException, OSError) as error:
                raise UserError(f"{self.origin}: the data set cannot be opened any more: {error}") from error
        return self._dataset

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_dataset": None, "_pickled": self._pickled or pickle.dumps(self._dataset)}


class ArrowFileRows:
    """Rows of .arrow files, streams (as `datasets` writes) or with a footer (Feather 2), mapped into memory.

    Picklable: a worker maps the files again, when it is asked for a row. Raises ValueError for files that are damaged
    or differ in their columns.
    """

    def __init__(self, paths: Sequence[Path], origin: str):
        self.origin = origin
        self._files = [MappedFile(path) for path in paths]
        self._tables: list[pa.Table] | None = None
        tables = self._opened()
        for path, table in zip(paths, tables, strict=True):
            if table.schema != tables[0].schema:
                raise ValueError(f"source {path}: other columns than {paths[0]} has (sources[].path)")
        self._starts = _starts([len(table) for table in tables])

    @property
    def table(self) -> pa.Table:
        return pa.concat_tables(self._opened())

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, row: int) -> Any:
        """Raises as `ArrowRows`."""
        number = _part_of(row, self._starts)
        self._files[number].check()
        table = self._opened()[number]
        with of_the_record():
            return table.slice(int(row - self._starts[number]), 1).to_pylist()[0]

    def where(self, row: int) -> str:
        return f"{self.origin}, row {row}"

    def _opened(self) -> list[pa.Table]:
        if self._tables is None:
            self._tables = [_read(Path(file.path)).replace_schema_metadata() for file in self._files]
        return self._tables

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_tables": None}


def _starts(lengths: Sequence[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def _part_of(row: int, starts: np.ndarray) -> int:
    return int(np.searchsorted(starts, row, side="right")) - 1


def _mapped_parts(table: Any) -> Iterator[tuple[int, list[MappedFile]]]:
    """(number of rows, the files that hold them) of a table of the `datasets` library, in order of its rows."""
    from datasets.table import ConcatenationTable, MemoryMappedTable

    blocks = table.blocks if isinstance(table, ConcatenationTable) else [[table]]
    for block in blocks:
        yield len(block[0]), [MappedFile(part.path) for part in block if isinstance(part, MemoryMappedTable)]


def _read(path: Path) -> pa.Table:
    try:
        mapped = pa.memory_map(str(path))
        is_file = mapped.read(len(_FILE_MAGIC)) == _FILE_MAGIC
        mapped.seek(0)
        return (pa.ipc.open_file if is_file else pa.ipc.open_stream)(mapped).read_all()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"source {path}: damaged, or no Arrow file: {error} (sources[].path)") from error
