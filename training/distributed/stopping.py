"""Stopping on request: a signal to any rank, or the stop file, and all ranks agree after the step they are in."""

from __future__ import annotations

import logging
import signal
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from training.distributed.engine import Ranks
from training.exit_codes import STOP_FILE

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Remembers that this rank was asked to stop. A signal never interrupts a step or a save."""

    def __init__(self, folder: Path):
        self._stop_file = folder / STOP_FILE
        self._asked = False
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, _frame) -> None:
        if not self._asked:
            logger.warning("%s: finishing this step, then saving", signal.Signals(number).name)
        self._asked = True

    @property
    def is_asked(self) -> bool:
        return self._asked or self._stop_file.exists()


class Agreement:
    """Lets ranks agree on flags once per step, over gloo on the CPU: nothing waits for the device."""

    def __init__(self, ranks: Ranks, timeout_minutes: float):
        """A rank that does not come within `timeout_minutes` ends the run."""
        timeout = timedelta(minutes=timeout_minutes)
        self._group = dist.new_group(backend="gloo", timeout=timeout) if ranks.world_size > 1 else None

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag, whether it is set on any rank. Every rank must call this."""
        if self._group is None:
            return flags
        votes = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(votes, dist.ReduceOp.MAX, group=self._group)
        return tuple(bool(vote) for vote in votes.tolist())

    def any_rank(self, flag: bool) -> bool:
        """The same for one flag."""
        return self.any(flag)[0]

    def meet(self, timeout_minutes: float) -> None:
        """Wait until every rank is here, for at most so long."""
        if self._group is not None:
            dist.monitored_barrier(self._group, timeout=timedelta(minutes=timeout_minutes))
