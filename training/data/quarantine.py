"""Records that cannot be used: each with its file and reason, in a JSONL file, and counted."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pixelprune.files import write_whole
from training.errors import side_write

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Quarantined:
    """One record that is not trained on. `reason` is a short code; `detail` says what is wrong."""

    record: str
    file: str
    reason: str
    detail: str


def write_quarantine(path: Path, entries: Iterable[Quarantined]) -> None:
    """Replace the file by these entries, in one go."""
    lines = "".join(json.dumps(asdict(entry)) + "\n" for entry in entries)
    write_whole(path, lines.encode(), is_shared=True)


def append_quarantine(path: Path | None, entry: Quarantined) -> None:
    """Add one entry, loudly: this is for records that went bad while a run was under way. Without a path, log only."""
    logger.error("quarantined %s (%s): %s: %s", entry.record, entry.file, entry.reason, entry.detail)
    if path is None:
        return
    with side_write("what was quarantined", go_on=True), path.open("a") as file:  # the log has it
        file.write(json.dumps(asdict(entry)) + "\n")


def read_quarantine(path: Path) -> list[Quarantined]:
    with path.open() as file:
        return [Quarantined(**json.loads(line)) for line in file]


def count_reasons(entries: Iterable[Quarantined]) -> dict[str, int]:
    """Entries per reason, the most frequent first."""
    return dict(Counter(entry.reason for entry in entries).most_common())


def refuse_above(share: float, entries: Sequence[Quarantined], num_records: int, where: str) -> None:
    """Raise ValueError when more than `share` of the records are quarantined, or all of them."""
    if len(entries) <= share * num_records and len(entries) < num_records:
        return
    reasons = ", ".join(f"{count} {reason}" for reason, count in count_reasons(entries).items())
    first = entries[0] if entries else Quarantined("none", "no file", "no records", "the source is empty")
    raise ValueError(
        f"{len(entries)} of {num_records} records cannot be used ({reasons}), which is above "
        f"data.max_quarantined_share={share}; first: {first.record} ({first.file}): {first.detail}; "
        f"all of them: {where}"
    )
