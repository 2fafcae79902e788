"""Plan -> packs of one rank, prepared ahead by worker processes, with the cursor of what was consumed.

Every micro-step of an optimizer step is prepared before the first one is handed out. Only then is it known whether a
record went bad since the index was built; its supervised tokens are subtracted from the step's count on all ranks by
one sum of three integers over the ranks per optimizer step, and losses stay exact sums over an exact global count.

torch's DataLoader cannot replace a worker that was killed. Its tasks follow from the plan, so what was not handed out
yet is prepared again by a fresh set of workers, and the run gets the same packs.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader

from pixelprune.pack import Pack, VisionGeometry
from pixelprune.records.prepare import PrepareSettings
from training.data.index import Index
from training.data.plan import EpochPlan, PlanInput, PlanSettings, StepPlan, num_steps, plan_epoch
from training.data.quarantine import Quarantined, append_quarantine
from training.data.targets import TargetReader
from training.data.upload import upload_ahead
from training.data.worker import PackDataset, PackFailure, PackResult, PackTask, start_worker
from training.errors import RankError, UserError
from training.on_policy.draft import is_chosen

logger = logging.getLogger(__name__)

MAX_DEATHS = 3
"""Sets of workers that may die over one pack: then it is the pack that ends them, or memory is short."""

SumOverRanks = Callable[[torch.Tensor], torch.Tensor]
"""Sums a few numbers over all ranks (`Ranks.sum`); called once per optimizer step by every rank."""


Answered = Callable[[int, list[PackResult]], list[PackResult]]
"""Makes packs of all drafts of a step of this rank, from the step's number since the start of the run."""


class Cursor(NamedTuple):
    """The next optimizer step to run: `step` counts within the epoch. The whole state of the data order."""

    epoch: int = 0
    step: int = 0


START = Cursor()


@dataclass(frozen=True)
class MicroBatch:
    """One pack of one rank.

    step: optimizer step counted from the start of the run; micro_step within it; is_boundary: the last one of it.
    num_supervised, loss_weight (the sum of their weights), num_samples: of the whole optimizer step over all ranks,
    without what was lost.
    cursor: where to continue once this batch is consumed. is_dummy: nothing in here but the dummy.
    flops: planned cost of the pack, less what it shares.
    """

    pack: Pack
    step: int
    micro_step: int
    is_boundary: bool
    num_supervised: int
    loss_weight: float
    num_samples: int
    cursor: Cursor
    is_dummy: bool
    flops: float = 0.0

    @property
    def record_ids(self) -> tuple[str, ...]:
        return self.pack.record_ids


CPU = torch.device("cpu")


@dataclass(frozen=True)
class LoaderSettings:
    """How packs are prepared.

    device: packs arrive there when it is CUDA (pinned memory, copied in the background). num_workers 0: in-process.
    dummy_image: see `PixelPruneCollator`. share_prefix, share_vision: see `PackDataset`. max_quarantined_share: of all
    records, lost within one epoch.
    report: JSONL file for records that went bad while running (one file per rank).
    """

    num_workers: int = 0
    prefetch_packs: int = 2
    dummy_image: bool = True
    share_prefix: bool = False
    share_vision: bool = False
    device: torch.device = CPU
    max_quarantined_share: float = 0.01
    report: Path | None = None


class _PlannedStep(NamedTuple):
    cursor: Cursor
    plan: StepPlan
    after: Cursor


class PackLoader:
    """The packs of one rank from a cursor on, epoch after epoch. Iterating it again starts at the cursor again."""

    def __init__(
        self,
        index: Index,
        inputs: PlanInput,
        plan_settings: PlanSettings,
        prepare: PrepareSettings,
        geometry: VisionGeometry,
        settings: LoaderSettings,
        *,
        rank: int = 0,
        world_size: int = 1,
        cursor: Cursor = START,
        num_steps: int | None = None,
        first_step: int | None = None,
        sum_over_ranks: SumOverRanks = torch.clone,
        targets: TargetReader | None = None,
        saved_flops: Callable[[Pack], float] | None = None,
        on_policy: float = 0.0,
        answered: Answered | None = None,
    ):
        """`num_steps` counts from the start of the run, not from the cursor; by default the cursor's epoch is ended.

        first_step: steps done before the cursor; by default those that this plan has before it.
        targets: cached teacher targets that go with every pack; with `prepare.with_full` full rows do instead.
        saved_flops: what a pack costs less than its samples apart, for a prefix or a picture that they share.
        on_policy: share of the samples that the student answers itself; answered: makes the packs of a step then.
        """
        assert (answered is not None) == (on_policy > 0), "drafts, and who makes packs of them"
        self.on_policy, self.answered = on_policy, answered
        self.saved_flops = saved_flops
        self.index, self.inputs, self.plan_settings, self.settings = index, inputs, plan_settings, settings
        self.rank, self.world_size, self.start = rank, world_size, Cursor(*cursor)
        self.sum_over_ranks = sum_over_ranks
        self.first_step = self._global_step(self.start) if first_step is None else first_step
        self.last_step = num_steps if num_steps is not None else self._global_step(Cursor(self.start.epoch + 1, 0))
        self._dataset = PackDataset(
            index.sources,
            prepare,
            geometry,
            settings.dummy_image,
            targets,
            share_prefix=settings.share_prefix,
            share_vision=settings.share_vision,
            as_drafts=on_policy > 0,
        )
        self._lost_in_epoch = [self.start.epoch, 0]
        self._data_loader: DataLoader | None = None
        self._num_handed_out = 0
        self._plans: dict[int, EpochPlan] = {}

    def __iter__(self) -> Iterator[MicroBatch]:
        for _, batches in self.steps():
            yield from batches

    def steps(self) -> Iterator[tuple[int, Iterator[MicroBatch]]]:
        """(optimizer step since the start of the run, its micro-batches); waiting happens in the inner iterator."""
        results = self._results()
        self._lost_in_epoch = [self.start.epoch, 0]
        for step, planned in enumerate(self._planned_steps(), start=self.first_step):
            batches = self._micro_batches(step, planned, results)
            yield step, batches
            # A caller that left the step early must not shift the following ones.
            for _ in batches:
                pass

    def _micro_batches(
        self, step: int, planned: _PlannedStep, results: Iterator[PackResult | PackFailure]
    ) -> Iterator[MicroBatch]:
        plan, prepared, failure = planned.plan, list[PackResult](), None
        for result in (next(results) for _ in range(plan.num_micro_steps)):
            if isinstance(result, PackFailure):
                failure = failure or result
            else:
                prepared.append(result)
        if self.answered is not None and failure is None:
            prepared = self.answered(step, prepared)
        num_supervised, loss_weight, num_samples = self._without_lost(planned.cursor, plan, prepared, failure)
        for micro_step, (pack, result) in enumerate(upload_ahead(prepared, self.settings.device)):
            is_boundary = micro_step == plan.num_micro_steps - 1
            yield MicroBatch(
                pack,
                step,
                micro_step,
                is_boundary,
                num_supervised,
                loss_weight,
                num_samples,
                planned.after if is_boundary else planned.cursor,
                result.is_dummy,
                float(plan.apart_cost[micro_step, self.rank]) - (self.saved_flops(pack) if self.saved_flops else 0.0),
            )

    def _without_lost(
        self, cursor: Cursor, plan: StepPlan, prepared: list[PackResult], failure: PackFailure | None
    ) -> tuple[int, float, int]:
        """Supervised tokens, the sum of their weights, and samples of the step over all ranks, without what went bad.

        Raises UserError on all ranks when too many did, or when one rank met a failure (RankError there).
        """
        lost = [entry for result in prepared for entry in result.lost]
        for entry in lost:
            self._report(entry)
        mine = [sum(result.num_lost_supervised for result in prepared), len(lost), int(failure is not None)]
        lost_weight = sum(result.lost_loss_weight for result in prepared)
        # Counts up to 2^53 are exact in float64.
        *counts, lost_weight = self.sum_over_ranks(torch.tensor([*mine, lost_weight], dtype=torch.float64)).tolist()
        tokens, samples, num_failures = map(int, counts)
        if failure:
            raise RankError(failure.message)
        if num_failures:
            raise UserError(f"{num_failures} other ranks could not prepare their packs and say why")
        if cursor.epoch != self._lost_in_epoch[0]:
            self._lost_in_epoch = [cursor.epoch, 0]
        self._lost_in_epoch[1] += samples
        if self._lost_in_epoch[1] > self.settings.max_quarantined_share * self.index.num_records:
            raise UserError(
                f"{self._lost_in_epoch[1]} records of epoch {cursor.epoch} can no longer be used, of "
                f"{self.index.num_records} in all: more than data.max_quarantined_share="
                f"{self.settings.max_quarantined_share}; they changed since the index was built, see "
                f"{self.settings.report or 'the log'}"
            )
        return plan.num_supervised - tokens, plan.loss_weight - lost_weight, plan.num_samples - samples

    def _report(self, entry: Quarantined) -> None:
        append_quarantine(self.settings.report, entry)

    def _results(self) -> Iterator[PackResult | PackFailure]:
        """Results in plan order, the same ones whether or not workers die meanwhile. Raises RankError when they die
        over one pack again and again."""
        self._num_handed_out = num_deaths = 0
        is_careful = False
        results = self._prepared(is_careful)
        while True:
            died = ""
            try:
                result = next(results)
            except StopIteration:
                return
            except RuntimeError as error:
                died = str(error)
                if not died.startswith("DataLoader worker (pid"):  # one that a worker raised, or torch itself
                    raise
            if died:
                num_deaths += 1
                self._refuse_deaths(num_deaths, died)
            else:
                self._num_handed_out += 1
                yield result
                num_deaths = 0
            if died or is_careful:
                # The old ones go before the new ones come: memory may be what is short.
                self._data_loader = None
                del results
                is_careful = num_deaths == MAX_DEATHS - 1
                results = self._prepared(is_careful)

    def _refuse_deaths(self, num_deaths: int, died: str) -> None:
        """Say that workers died; RankError after MAX_DEATHS sets of them over the pack that is waited for."""
        if num_deaths < MAX_DEATHS:
            logger.warning("rank %d: loader workers died, new ones prepare what is still to come: %s", self.rank, died)
            return
        where = [self.index.sources[number].rows.where(row) for number, row, *_ in next(self._tasks_left()).records]
        raise RankError(
            f"rank {self.rank}: {num_deaths} sets of loader workers died over one pack ({', '.join(where[:8])}"
            f"{', ...' if len(where) > 8 else ''}): {died}; most likely memory is short: use fewer than "
            f"data.num_workers={self.settings.num_workers}, or smaller packs (data.pack_tokens)"
        )

    def _prepared(self, is_careful: bool) -> Iterator[PackResult | PackFailure]:
        """is_careful: one worker with one pack at a time: the pack that is waited for is then the one that ends it."""
        # The worker processes stay for the next iteration (validation runs the same loader again and again).
        if self._data_loader is None:
            self._data_loader = self._new_data_loader(is_careful)
        with _own_child_signal():
            return iter(self._data_loader)

    def _tasks_left(self) -> Iterator[PackTask]:
        """This rank's tasks in order, without those whose results were handed out."""
        tasks = ((planned.cursor, m[self.rank]) for planned in self._planned_steps() for m in planned.plan.micro_steps)
        return (self.task(rows, cursor) for cursor, rows in itertools.islice(tasks, self._num_handed_out, None))

    def _new_data_loader(self, is_careful: bool) -> DataLoader:
        """DataLoader keeps the order of its sampler whatever worker is first."""
        workers = 1 if is_careful else self.settings.num_workers
        options: dict = {}
        if workers:
            # A whole optimizer step is prepared ahead while the one before it is trained on.
            ahead = max(self.settings.prefetch_packs, -(-self._first_num_micro_steps() // workers) + 1)
            options = {
                "prefetch_factor": 1 if is_careful else ahead,
                "multiprocessing_context": "spawn",
                "worker_init_fn": start_worker,
                "persistent_workers": True,
            }
        # Its own generator: a DataLoader draws a seed with every iteration, from the global one by default, which a
        # resumed run has just put back to where dropout was.
        generator = torch.Generator().manual_seed(self.plan_settings.seed)
        return DataLoader(
            self._dataset,
            sampler=_Tasks(self),  # type: ignore[arg-type]
            batch_size=None,
            num_workers=workers,
            pin_memory=self.settings.device.type == "cuda",
            generator=generator,
            **options,
        )

    def _first_num_micro_steps(self) -> int:
        return next((planned.plan.num_micro_steps for planned in self._planned_steps()), 1)

    def _planned_steps(self) -> Iterator[_PlannedStep]:
        """From the cursor to the last step. Gone through twice: for the tasks and, steps later, for the batches."""
        cursor, plan = self.start, None
        for _ in range(self.first_step, self.last_step):
            if plan is None or plan.epoch != cursor.epoch:
                plan = self._plan(cursor.epoch)
            is_last = cursor.step + 1 >= len(plan)
            after = Cursor(cursor.epoch + 1, 0) if is_last else Cursor(cursor.epoch, cursor.step + 1)
            yield _PlannedStep(cursor, plan[cursor.step], after)
            cursor = after

    def _plan(self, epoch: int) -> EpochPlan:
        """The plan of an epoch, shared by tasks and batches; the one before it is kept while its last steps run."""
        if epoch not in self._plans:
            plan = plan_epoch(self.inputs, self.plan_settings, epoch=epoch, world_size=self.world_size)
            self._plans = {e: p for e, p in self._plans.items() if e == epoch - 1} | {epoch: plan}
        return self._plans[epoch]

    def _global_step(self, cursor: Cursor) -> int:
        steps = [num_steps(self.inputs, self.plan_settings, epoch) for epoch in range(cursor.epoch)]
        return sum(steps) + cursor.step

    def task(self, rows, cursor: Cursor = START) -> PackTask:
        """The task of a pack made of these rows of the index, in the step at `cursor`."""
        index = self.index
        columns = (
            index.source[rows],
            index.row[rows],
            index.content_hash[rows],
            index.num_supervised[rows],
            index.loss_weight[rows],
        )
        records = tuple(zip(*(column.tolist() for column in columns), strict=True))
        if not self.on_policy:
            return PackTask(records)
        place = (self.plan_settings.seed, *cursor)
        return PackTask(records, tuple(is_chosen(self.on_policy, *place, int(row)) for row in rows))


class _Tasks:
    """This rank's packs in order, as the DataLoader's sampler."""

    def __init__(self, loader: PackLoader):
        # Without a cycle a loader that is let go ends its processes at once, not when Python finds the time.
        self.loader = weakref.proxy(loader)

    def __iter__(self) -> Iterator[PackTask]:
        yield from self.loader._tasks_left()


@contextlib.contextmanager
def _own_child_signal() -> Iterator[None]:
    """The process's own answer to SIGCHLD, instead of torch's: an error out of whatever runs as a worker dies, the
    middle of a backward pass included. Without it the death is noticed where the worker's result is waited for."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        if before is not None:  # None: one that Python cannot put back
            signal.signal(signal.SIGCHLD, before)
