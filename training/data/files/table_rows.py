"""Rows of tables, read as Arrow so that images stay encoded until a worker decodes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pixelprune.records.record import of_the_record

__all__ = ["ArrowFileRows", "ArrowRows"]

_FILE_MAGIC = b"ARROW1"


class ArrowRows:
    """Rows of a `datasets.Dataset`: Parquet, saved data sets, the hub."""

    def __init__(self, dataset, origin: str):
        self.dataset = dataset.with_format("arrow")
        self.origin = origin

    @property
    def table(self) -> Any:
        """Columns by name, in chunks."""
        return self.dataset.data

    def __len__(self) -> int:
        return len(self.dataset)

    @of_the_record()
    def __getitem__(self, row: int) -> Any:
        """Raises RecordError for a row that Python cannot hold: no valid Unicode, a date too far."""
        return self.dataset[int(row)].to_pylist()[0]

    def where(self, row: int) -> str:
        return f"{self.origin}, row {row}"


class ArrowFileRows:
    """Rows of .arrow files, streams (as `datasets` writes) or with a footer (Feather 2), mapped into memory.

    Picklable: a worker maps the files again. Raises ValueError for files that are damaged or differ in their columns.
    """

    def __init__(self, paths: Sequence[Path], origin: str):
        self.paths = list(paths)
        self.origin = origin
        self._open()

    def _open(self) -> None:
        tables = [_read(path) for path in self.paths]
        for path, table in zip(self.paths, tables, strict=True):
            if table.schema.remove_metadata() != tables[0].schema.remove_metadata():
                raise ValueError(f"source {path}: other columns than {self.paths[0]} has (sources[].path)")
        batches = [batch for table in tables for batch in table.to_batches() if len(batch)]
        self.table = pa.concat_tables([table.replace_schema_metadata() for table in tables])
        self._batches = batches
        self._starts = np.concatenate([[0], np.cumsum([len(batch) for batch in batches])]).astype(np.int64)

    def __len__(self) -> int:
        return len(self.table)

    @of_the_record()
    def __getitem__(self, row: int) -> Any:
        """Raises RecordError for a row that Python cannot hold: no valid Unicode, a date too far."""
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self._batches[number].slice(int(row - self._starts[number]), 1).to_pylist()[0]

    def where(self, row: int) -> str:
        return f"{self.origin}, row {row}"

    def __getstate__(self) -> dict:
        return {"paths": self.paths, "origin": self.origin}

    def __setstate__(self, state: dict) -> None:
        self.__dict__ |= state
        self._open()


def _read(path: Path) -> pa.Table:
    try:
        mapped = pa.memory_map(str(path))
        is_file = mapped.read(len(_FILE_MAGIC)) == _FILE_MAGIC
        mapped.seek(0)
        return (pa.ipc.open_file if is_file else pa.ipc.open_stream)(mapped).read_all()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"source {path}: damaged, or no Arrow file: {error} (sources[].path)") from error
