"""What the index knows of a record: its row, measured for one record after another, or for many stage by stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pixelprune.attention.prefixes import picture_hash, picture_prefix
from pixelprune.records.prepare import Preparer
from pixelprune.records.record import RecordError
from pixelprune.text.steps import Steps, all_at_once
from training.data.measuring.pictures import MeasuredPictures
from training.data.sources import Source
from training.errors import UserError

__all__ = ["Row", "measure_row", "measured_rows", "row_steps", "unmeasured"]

Row = dict[str, Any]

GROUP_ROWS = 16
"""Records whose stages are done together. Enough for what a stage needs to stay in the processor's cache; few, since
images that records bring with them are held meanwhile."""
NUM_PAUSES = 3
"""Of `row_steps`; behind the last one come pictures, one record after another."""


def row_steps(preparer: Preparer, source: Source, row: int, pictures: MeasuredPictures) -> Steps[Row]:
    """One row of the index; a record that cannot be used comes back with its reason. Pauses as `Preparer.steps`."""
    try:
        prepared = yield from preparer.steps(
            source.rows[row],
            source.root,
            record_format=source.settings.format,
            preset=source.settings.preset(),
            memo=pictures,
        )
    except RecordError as error:
        return unmeasured(row, error.reason, str(error))
    except UserError:
        raise
    except Exception as error:
        error.add_note(f"while measuring {source.rows.where(row)}")
        raise
    sample = prepared.sample
    kept = [image.selection.num_kept for image in sample.images]
    keys = pictures.take_keys()
    prefix_hash, prefix_text = picture_prefix(sample, preparer.image_token_id, keys)
    return {
        "row": row,
        "reason": "",
        "detail": "",
        "content_hash": prepared.content_hash,
        "text_tokens": len(sample) - sum(kept),
        "num_supervised": sample.num_supervised,
        "loss_weight": sample.loss_weight,
        "weight": prepared.record.weight,
        "kept_blocks": kept,
        "full_blocks": [image.num_full_blocks for image in sample.images],
        "prefix_hash": prefix_hash,
        "prefix_text": prefix_text,
        "picture_hash": picture_hash(sample, keys),
    }


_measured = all_at_once(row_steps)


def measure_row(preparer: Preparer, source: Source, row: int) -> Row:
    """One row by itself, in one go."""
    return _measured(preparer, source, row, MeasuredPictures())


def measured_rows(
    steps_of: Callable[[int], Steps[Row]], rows: Sequence[int], begin: Callable[[int], None] = lambda row: None
) -> Iterator[Row]:
    """The rows of the index in that order, their texts prepared stage by stage.

    steps_of: `row_steps` of a row. begin: told of every row that is worked at from now on, several times of each.
    """
    for start in range(0, len(rows), GROUP_ROWS):
        group = rows[start : start + GROUP_ROWS]
        at_work: dict[int, Steps[Row]] = {}
        measured: dict[int, Row] = {}
        for stage in range(NUM_PAUSES + 1):
            for row in group:
                if row not in measured:
                    begin(row)
                    if stage == 0:
                        at_work[row] = steps_of(row)
                    _advance(row, at_work[row], measured)
                if stage == NUM_PAUSES:
                    yield measured.pop(row)


def _advance(row: int, steps: Steps[Row], measured: dict[int, Row]) -> None:
    try:
        next(steps)
    except StopIteration as end:
        measured[row] = end.value


def unmeasured(row: int, reason: str, detail: str) -> Row:
    """The row of a record that cannot be used."""
    return {
        "row": row,
        "reason": reason,
        # A name that is no Unicode is shown with its bytes escaped: Parquet takes no other text.
        "detail": detail.encode("utf-8", "backslashreplace").decode(),
        "content_hash": 0,
        "text_tokens": 0,
        "num_supervised": 0,
        "loss_weight": 0.0,
        "weight": 0.0,
        "kept_blocks": [],
        "full_blocks": [],
        "prefix_hash": 0,
        "prefix_text": 0,
        "picture_hash": 0,
    }
