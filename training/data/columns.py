"""Columns of a table that no record reader knows: named once, before anything is measured."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from pixelprune.records.keys import KeyRules
from pixelprune.records.reader import RECORD_KEYS
from pixelprune.records.shapes import SHAPE_KEYS
from training.data.files.table_rows import ArrowFileRows, ArrowRows
from training.data.sources import Source

__all__ = ["refuse_unread_columns", "unread_columns"]

READ_KEYS = (*RECORD_KEYS, *SHAPE_KEYS)


def unread_columns(source: Source, rules: KeyRules) -> list[str]:
    """Columns that hold something and that nobody knows; none for JSON, whose records are judged one by one.

    Keys with a known meaning elsewhere (tools, chosen) are left to the reader, which sees where they are empty.
    """
    if not isinstance(source.rows, ArrowRows | ArrowFileRows):
        return []
    table = source.rows.table
    names = [name for name in table.column_names if not rules.knows(name, "record", READ_KEYS)]
    return [name for name in names if any(_says_something(chunk) for chunk in table.column(name).chunks)]


def refuse_unread_columns(source: Source, rules: KeyRules) -> None:
    """Raises ValueError with all unread columns of a source."""
    names = unread_columns(source, rules)
    if names:
        raise ValueError(
            f"source {source.settings.path}: columns that are not read: {', '.join(names)}; remove them, or name them "
            "in data.ignore_keys if they say nothing about training"
        )


def _says_something(chunk: pa.Array) -> bool:
    if chunk.null_count == len(chunk):
        return False
    kind = chunk.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return bool(pc.any(pc.greater(pc.binary_length(chunk), 0)).as_py())
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return bool(pc.any(pc.greater(pc.list_value_length(chunk), 0)).as_py())
    return True
