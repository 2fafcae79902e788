"""The processes of a run, and what they tell each other: the first decides, any may ask, all add up.

All methods are collective: every rank calls them, in the same order. An error that one rank meets in the midst of one
is told to the others, who raise too, so that none is left behind waiting. All of it travels over gloo on the CPU,
whatever the backend of training: nothing waits for the device.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from training.command import leave_to_the_first
from training.distributed.build_lock import clear_stale_lock
from training.distributed.cores import usable_core_numbers, usable_cores
from training.errors import RankError, UserError

T = TypeVar("T")

logger = logging.getLogger(__name__)

TIMEOUT_MINUTES = 30.0
PATIENCE_MINUTES = 7 * 24 * 60.0
"""For work that takes ranks hours more or less, as indexing may: a barrier after it is no sign that one hangs."""


@dataclass(frozen=True)
class Ranks:
    """This process among all of them."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    world_size_per_node: int = 1
    has_launcher: bool = True
    """False for a process that nothing started as a rank: it can index, cache and evaluate, but not train."""
    ranks_on_cores: int = 1
    """Ranks that may run on this rank's cores: all of the machine, or 1 where a scheduler binds each to its own."""
    group: Any = field(default=None, compare=False, repr=False)
    """The gloo process group; None for one rank alone, which has nobody to ask."""

    @property
    def cores_per_rank(self) -> int:
        """CPU cores that this process may use, for each of the ranks that share them."""
        return max(1, usable_cores() // self.ranks_on_cores)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return self.any_of(flag)[0]

    def any_of(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag, whether it is set on any rank."""
        votes = self.max(torch.tensor(flags, dtype=torch.int32))
        return tuple(bool(vote) for vote in votes.tolist())

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sums over all ranks, element by element, on the CPU; shape and dtype are the same on every rank."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def max(self, values: torch.Tensor) -> torch.Tensor:
        """The largest of all ranks, element by element, as `sum`."""
        return self._reduced(values, dist.ReduceOp.MAX)

    def min(self, values: torch.Tensor) -> torch.Tensor:
        """The smallest of all ranks, element by element, as `sum`."""
        return self._reduced(values, dist.ReduceOp.MIN)

    def gather(self, value: T) -> list[T]:
        """What every rank has, in the order of ranks, on all of them."""
        if self._is_alone:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def from_first(self, decide: Callable[[], T]) -> T:
        """What `decide` gives on the first rank, which alone calls it, on all of them.

        A UserError of it is raised on all ranks. Of another exception, and of a RankError, which the first rank tells
        itself, the others hear that it came: they raise UserError.
        """
        if self._is_alone:
            return decide()
        answer: list[Any] = [None, None]
        failure: Exception | None = None
        if self.is_first:
            try:
                answer[0] = decide()
            except Exception as error:  # noqa: BLE001 - raised below, when the other ranks know
                failure, answer[1] = error, _for_others(error, "the first rank ")
        dist.broadcast_object_list(answer, src=0, group=self.group)
        if failure is not None:
            raise failure
        if answer[1] is not None:
            raise answer[1]
        return answer[0]

    def agree(self, do: Callable[[], T]) -> T:
        """`do` on every rank, and its result on this one, when it went well on all.

        A UserError of any is raised by all, with the rank where not all have met the same. What is raised of others is
        as in `from_first`.
        """
        result: Any = None
        failure: Exception | None = None
        try:
            result = do()
        except Exception as error:
            if self._is_alone:
                raise
            failure = error
        problems = self.gather(None if failure is None else _for_others(failure))
        met = {rank: str(problem) for rank, problem in enumerate(problems) if problem is not None}
        if failure is not None and not _is_for_all(failure):
            raise failure
        if len(met) == self.world_size and len(set(met.values())) == 1:
            raise next(problem for problem in problems if problem is not None)
        if met:
            raise UserError("; ".join(f"rank {rank}: {problem}" for rank, problem in met.items()))
        return result

    def barrier(self, minutes: float | None = None) -> None:
        """Wait until every rank is here, for so long at most; by default for as long as any collective may take."""
        if self._is_alone:
            return
        if minutes is None:
            dist.barrier(self.group)
        else:
            dist.monitored_barrier(self.group, timeout=timedelta(minutes=minutes))

    @property
    def _is_alone(self) -> bool:
        assert self.world_size == 1 or self.group is not None, "ranks that ask each other come from join_ranks"
        return self.world_size == 1

    def _reduced(self, values: torch.Tensor, how: Any) -> torch.Tensor:
        result = values.detach().to("cpu", copy=True)
        if not self._is_alone:
            dist.all_reduce(result, how, group=self.group)
        return result


def join_ranks(timeout_minutes: float = TIMEOUT_MINUTES) -> Ranks:
    """Join the process group that the launcher described (one process alone counts as a group of one).

    timeout_minutes: a rank that keeps the others waiting in a collective for longer ends the run.
    """
    accelerator = get_accelerator()
    alone = -1
    local_rank = dist.get_node_local_rank(fallback_rank=alone)
    accelerator.set_device(max(0, local_rank))
    timeout = timedelta(minutes=timeout_minutes)
    if local_rank == alone and not dist.is_initialized():
        # Without a launcher DeepSpeed would ask MPI who else is there.
        dist.init_process_group(
            accelerator.communication_backend_name(), store=dist.HashStore(), rank=0, world_size=1, timeout=timeout
        )
    has_launcher, local_rank = local_rank != alone, max(0, local_rank)
    if accelerator.device_name() == "cpu":
        clear_stale_lock(
            wait_for_builder=False
        )  # whoever started the ranks: what they load next would wait for it for ever
    if has_launcher and local_rank == 0:
        logger.info("waiting for the other ranks, %g minutes at most (distributed.timeout_minutes)", timeout_minutes)
    # DeepSpeed prints "... built successfully" on every rank, whether it has built anything or not.
    with contextlib.redirect_stdout(io.StringIO()):
        deepspeed.init_distributed(accelerator.communication_backend_name(), timeout=timeout, verbose=False)
    device = torch.device(accelerator.current_device_name())
    world_size = dist.get_world_size()
    group = dist.new_group(backend="gloo", timeout=timeout) if world_size > 1 else None
    ranks = Ranks(dist.get_rank(), world_size, local_rank, device, has_launcher=has_launcher, group=group)
    if not ranks.is_first:
        leave_to_the_first()
    _unlink_shared_buffers(ranks)
    mine = (socket.gethostname(), usable_core_numbers())
    here = [numbers for host, numbers in ranks.gather(mine) if host == mine[0]]
    sharing = sum(not numbers.isdisjoint(mine[1]) for numbers in here)
    return dataclasses.replace(ranks, world_size_per_node=len(here), ranks_on_cores=sharing)


def leave_ranks() -> None:
    """Leave the process group at the end of the work: gloo's threads abort a process that exits while in it."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _unlink_shared_buffers(ranks: Ranks) -> None:
    """Take the names of DeepSpeed's shared buffers (CPU collectives) out of the file system; every rank calls this.

    Nothing else ever does: 69 MB of memory per rank would outlive every run until the machine is started again. What is
    mapped stays usable without a name.
    """
    ranks.barrier()  # every rank has mapped the buffers of all others
    maps = Path("/proc/self/maps")
    for line in maps.read_text().splitlines() if maps.exists() else ():
        _, found, name = line.partition("/dev/shm/deepspeed_allreduce_buffer")
        if found:
            Path((found + name).removesuffix(" (deleted)")).unlink(missing_ok=True)


def _is_for_all(error: Exception) -> bool:
    """Whether every rank may say this error as its own."""
    return isinstance(error, UserError) and not isinstance(error, RankError)


def _for_others(error: Exception, who: str = "") -> UserError:
    """What ranks that did not meet an error raise in its place."""
    if isinstance(error, UserError) and _is_for_all(error):
        return error
    return UserError(f"{who}ended with {type(error).__name__} and says why")
