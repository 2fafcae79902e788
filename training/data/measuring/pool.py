"""Processes of our own that measure records, each record under a time limit: one that hangs or dies is replaced.

A signal does not end a decoder that runs in C, and a thread cannot be ended at all: what takes too long is ended with
its process. The record that it was at is known, because a process writes into memory that it shares with its parent
which record it turns to. What it has measured it sends now and then: for short records a message each would cost as
much as the record.
"""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import signal
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Protocol

from pixelprune.records.record import UNEXPECTED
from training.data.measuring.row import Row
from training.data.measuring.shared_word import SharedWord

__all__ = ["TOO_SLOW", "Chunk", "MeasuringPool", "too_slow"]

logger = logging.getLogger(__name__)

TOO_SLOW = "too_slow"

POLL_SECONDS = 0.5
START_SECONDS = 2.0
"""What the first process measures alone: about what a start takes, which a small data set need not pay per core."""
SEND_SECONDS = 0.2
"""What a process that dies has measured since it last sent is measured again."""
DEATHS_PER_RECORD = 2
"""A process that dies may have been ended for what others did (memory): its record is tried once more."""
TRIES_TO_START = 2
"""In a row: one process may be killed by chance, two that cannot start have a reason."""
_PR_SET_PDEATHSIG = 1
_PLACE_BITS = 24
_FINISHING = (1 << _PLACE_BITS) - 1
"""In place of a record: what is done with the whole chunk."""


@dataclass(frozen=True)
class Chunk:
    """Rows of a source, by its number. part: the file that takes what was measured; without one it is handed back."""

    source: int
    rows: Sequence[int]
    part: Path | None = None


class Measurer(Protocol):
    """What a process does with chunks."""

    def measure(self, chunk: Chunk, rows: Sequence[int], begin: Callable[[int], None]) -> Iterator[Row]:
        """Those rows of the chunk, in order. begin: told of every row that is worked at from now on."""

    def finish(self, chunk: Chunk, rows: list[Row]) -> list[Row]:
        """Done with all rows of a chunk; what the chunk hands back."""


def too_slow(max_seconds: float) -> str:
    """What is said of a record that takes longer."""
    return f"took longer than data.max_seconds_per_record={max_seconds:g}"


@dataclass
class _Worker:
    process: multiprocessing.process.BaseProcess
    connection: Connection
    at: SharedWord
    """Shared with the process: a number that changes with every record it turns to, above the record's place in the
    chunk. One word, so that it is read whole."""
    seen: int = 0
    """What stood there when it was last looked at."""
    is_ready: bool = False
    number: int | None = None
    """Of the chunk that it measures."""
    known: dict[int, Row] = field(default_factory=dict)
    since: float = 0.0

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


@dataclass
class MeasuringPool:
    """start: called in each process.
    quarantined: the row of the index for a record that has no measure, from (row, reason, detail).
    max_seconds: for one record to be read, rendered, tokenised, or pruned; 0 for any time.
    """

    start: Callable[[], Measurer]
    quarantined: Callable[[int, str, str], Row]
    num_workers: int
    max_seconds: float
    is_stopped: Callable[[], bool] = lambda: False

    def measure(self, chunks: Sequence[Chunk]) -> Iterator[tuple[int, list[Row]]]:
        """(number of the chunk, what it hands back) as they are done; ends early when stopped.

        Raises ValueError for processes that cannot be started, and whatever a chunk's own work raises.
        """
        self._chunks, self._left = chunks, deque(range(len(chunks)))
        self._deaths: Counter[tuple[int, int]] = Counter()
        self._failed_starts = 0
        # The others follow when there is enough to do: a start costs seconds of a processor, mostly of imports.
        self._workers: list[_Worker] = [self._started()] if chunks else []
        self._ready_at: float | None = None
        num_done = 0
        try:
            while num_done < len(chunks) and not self.is_stopped():
                told = wait([worker.connection for worker in self._workers], POLL_SECONDS)
                for worker in list(self._workers):
                    if worker.connection in told:
                        done = self._hear(worker)
                        if done is not None:
                            num_done += 1
                            yield done
                    elif self._is_overdue(worker):
                        self._give_up_record(worker, TOO_SLOW, too_slow(self.max_seconds))
                self._start_others()
        finally:
            for worker in self._workers:
                worker.end()

    def _start_others(self) -> None:
        """Once the first process has measured for as long as a start takes, and chunks are left for more."""
        if self._ready_at is not None and time.monotonic() - self._ready_at > START_SECONDS:
            missing = min(self.num_workers - len(self._workers), len(self._left))
            self._workers += [self._started() for _ in range(missing)]

    def _started(self, number: int | None = None, known: dict[int, Row] | None = None) -> _Worker:
        # Spawned, not forked: the parent has threads (tokenizers, numba, CUDA) that a fork would leave locked.
        context = multiprocessing.get_context("spawn")
        mine, others = context.Pipe()
        at = SharedWord()
        process = context.Process(target=_serve, args=(others, at, self.start), daemon=True)
        process.start()
        others.close()
        at.close()
        return _Worker(process, mine, at, number=number, known=known or {}, since=_now())

    def _hear(self, worker: _Worker) -> tuple[int, list[Row]] | None:
        try:
            kind, value = worker.connection.recv()
        except (EOFError, OSError):  # OSError: in the midst of a message
            self._replace_dead(worker)
            return None
        worker.since = _now()
        if kind == "error":
            raise value
        if kind == "rows":
            worker.known |= {row["row"]: row for row in value}
            return None
        done = None
        if kind == "done":
            assert worker.number is not None
            done, worker.number, worker.known = (worker.number, value), None, {}
        elif kind == "ready":
            self._failed_starts = 0
            self._ready_at = self._ready_at or time.monotonic()
        worker.is_ready = True
        self._assign(worker)
        return done

    def _assign(self, worker: _Worker) -> None:
        if worker.number is None:
            if not self._left:
                return
            worker.number = self._left.popleft()
        try:
            worker.connection.send((self._chunks[worker.number], list(worker.known.values())))
        except OSError:
            self._replace_dead(worker)

    def _is_overdue(self, worker: _Worker) -> bool:
        at = worker.at.value
        if at != worker.seen:
            worker.seen, worker.since = at, _now()
        is_at_a_record = worker.is_ready and self._record_of(worker) is not None
        return is_at_a_record and 0 < self.max_seconds < _now() - worker.since

    def _record_of(self, worker: _Worker) -> int | None:
        """The record that the process was at when it was last looked at."""
        place = worker.seen & _FINISHING
        if worker.number is None or not worker.seen or place == _FINISHING:
            return None
        return self._chunks[worker.number].rows[place]

    def _give_up_record(self, worker: _Worker, reason: str, detail: str) -> None:
        """Go on without the record that the process is at, in a new process."""
        row = self._record_of(worker)
        assert row is not None, "at no record"
        logger.warning("a record is left out, and its process replaced: row %d %s", row, detail)
        worker.known[row] = self.quarantined(row, reason, detail)
        self._replace(worker)

    def _replace(self, worker: _Worker) -> None:
        worker.end()
        self._workers[self._workers.index(worker)] = self._started(worker.number, worker.known)

    def _replace_dead(self, worker: _Worker) -> None:
        worker.process.join()
        worker.seen = worker.at.value
        how = _ending(worker.process.exitcode)
        if not worker.is_ready and self._failed_starts < TRIES_TO_START - 1:
            self._failed_starts += 1
            logger.warning("a process that measures records died as it started (%s) and is replaced", how)
            self._replace(worker)
            return
        if not worker.is_ready:
            raise ValueError(f"a process that measures records could not start: {how}; {self._why_not(worker)}")
        number, row = worker.number, self._record_of(worker)
        if number is None:
            self._replace(worker)
            return
        self._deaths[number, -1 if row is None else row] += 1
        if self._deaths[number, -1 if row is None else row] < DEATHS_PER_RECORD:
            logger.warning("a process that measures records died (%s) and is replaced", how)
            self._replace(worker)
        elif row is None:
            raise ValueError(f"processes that write the index die ({how})")
        else:
            self._give_up_record(worker, UNEXPECTED, f"the process that measures it dies: {how}")

    def _why_not(self, worker: _Worker) -> str:
        """What ends a process before its first record, and what to do, by how it ended."""
        if (worker.process.exitcode or 0) < 0:
            return f"most likely memory is short: use fewer than data.index_workers={self.num_workers}"
        return (
            "its own lines, above, say why. These processes import the script that was started: one of your own starts "
            "everything below `if __name__ == '__main__':`"
        )


def _now() -> float:
    return time.monotonic()


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        return f"signal {-code} ({signal.Signals(-code).name})"
    return f"exit code {code}"


def _serve(connection: Connection, at: SharedWord, start: Callable[[], Measurer]) -> None:
    """What a process does: chunks in, rows out, then what the chunk hands back."""
    # A decoder that hangs never reads that the parent is gone; Ctrl-C is the parent's to answer.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        measurer = start()
        connection.send(("ready", None))
        while True:
            chunk, known = connection.recv()
            connection.send(("done", _measured(chunk, {row["row"]: row for row in known}, connection, at, measurer)))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except Exception as error:  # noqa: BLE001 - it is raised where the records are waited for
        connection.send(("error", error))


def _measured(
    chunk: Chunk, rows: dict[int, Row], connection: Connection, at: SharedWord, measurer: Measurer
) -> list[Row]:
    """rows: those that are known already; filled up."""
    visits = at.value >> _PLACE_BITS

    def turn_to(place: int) -> None:
        nonlocal visits
        visits += 1
        at.value = visits << _PLACE_BITS | place

    unsent: list[Row] = []
    sent = time.monotonic()
    for row in measurer.measure(
        chunk, [row for row in chunk.rows if row not in rows], lambda row: turn_to(chunk.rows.index(row))
    ):
        rows[row["row"]] = row
        unsent.append(row)
        if time.monotonic() - sent > SEND_SECONDS:
            connection.send(("rows", unsent))
            unsent, sent = [], time.monotonic()
    turn_to(_FINISHING)
    return measurer.finish(chunk, [rows[row] for row in chunk.rows])
