"""What processes that measure records are made to do by tests: they are started anew, so that no patch reaches them."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from training.data.index_builder import measure_row
from training.data.sources import Source


def marker(source: Source, row: int, what: str) -> Path:
    assert source.root is not None
    return source.root / f"{what}-{row}"


def hangs_at_3_and_5(preparer, source: Source, row: int) -> dict:
    """For ever, as a decoder may; tells by a file that it does."""
    if row in (3, 5):
        marker(source, row, "hangs").touch()
        while True:
            time.sleep(1000)
    return measure_row(preparer, source, row)


def tells_before_3_and_5(preparer, source: Source, row: int) -> dict:
    """What is really measured there takes long enough by itself."""
    if row in (3, 5):
        marker(source, row, "hangs").touch()
    return measure_row(preparer, source, row)


def dies(preparer, source: Source, row: int) -> dict:
    """Always at 4; at 6 only the first time, as one that the system ended for lack of memory."""
    if row == 4 or (row == 6 and not marker(source, row, "died").exists()):
        marker(source, row, "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return measure_row(preparer, source, row)


def counts(preparer, source: Source, row: int) -> dict:
    """Tells by a file that a row is measured."""
    marker(source, row, f"measured-{time.monotonic_ns()}").touch()
    return measure_row(preparer, source, row)


def logs(preparer, source: Source, row: int) -> dict:
    """Tells in a file which row is measured, and takes long enough to be killed meanwhile."""
    assert source.root is not None
    time.sleep(0.01)
    with (source.root / "measured.log").open("a") as file:
        file.write(f"{row}\n")
    return measure_row(preparer, source, row)
