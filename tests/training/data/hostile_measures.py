"""What processes that measure records are made to do by tests: they are started anew, so that no patch reaches them."""

from __future__ import annotations

import itertools
import os
import signal
import time
from pathlib import Path

from training.data.measuring.row import row_steps
from training.data.sources import Source


def marker(source: Source, row: int, what: str) -> Path:
    assert source.root is not None
    return source.root / f"{what}-{row}"


def hangs_at_3_and_5(preparer, source: Source, row: int, pictures):
    """For ever, as a decoder may; tells by a file that it does."""
    if row in (3, 5):
        marker(source, row, "hangs").touch()
        while True:
            time.sleep(1000)
    return row_steps(preparer, source, row, pictures)


def tells_before_3_and_5(preparer, source: Source, row: int, pictures):
    """What is really measured there takes long enough by itself: the picture of 3, the rendering of 5."""
    steps, pauses_before = row_steps(preparer, source, row, pictures), {3: 3, 5: 1}.get(row)
    for num_pauses in itertools.count():
        if num_pauses == pauses_before:
            marker(source, row, "hangs").touch()
        try:
            next(steps)
        except StopIteration as end:
            return end.value
        yield


def dies(preparer, source: Source, row: int, pictures):
    """Always at 4; at 6 only the first time, as one that the system ended for lack of memory."""
    if row == 4 or (row == 6 and not marker(source, row, "died").exists()):
        marker(source, row, "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return row_steps(preparer, source, row, pictures)


def counts(preparer, source: Source, row: int, pictures):
    """Tells by a file that a row is measured."""
    marker(source, row, f"measured-{time.monotonic_ns()}").touch()
    return row_steps(preparer, source, row, pictures)


def logs(preparer, source: Source, row: int, pictures):
    """Tells in a file which row is measured, and takes long enough to be killed meanwhile."""
    assert source.root is not None
    time.sleep(0.01)
    with (source.root / "measured.log").open("a") as file:
        file.write(f"{row}\n")
    return row_steps(preparer, source, row, pictures)
