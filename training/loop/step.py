"""One optimizer step: the packs of this rank through the engine, and what a step that went wrong says."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import NamedTuple

import torch

from training.data.loader import Cursor, MicroBatch
from training.distributed.engine_protocol import Engine
from training.distributed.ranks import Ranks
from training.errors import RankError
from training.tracking.meter import StepMeter

logger = logging.getLogger(__name__)


class StepOutcome(NamedTuple):
    """Where the data continues after a step, and which packs it was made of on this rank, each with its loss sum."""

    cursor: Cursor
    packs: list[tuple[tuple[str, ...], torch.Tensor]]


def run_step(engine: Engine, batches: Iterable[MicroBatch], meter: StepMeter) -> StepOutcome:
    """One optimizer step: forward and backward of every micro-step, gradients reduced, weights updated.

    The loss of a pack is a sum; divided by the weights of all supervised tokens of the step over all ranks (by their
    number, where none is weighted) it is this pack's share of the mean. ZeRO averages gradients over ranks, hence the
    factor world size.
    Raises RankError when the device's memory does not hold a pack.
    """
    batches, packs, batch = iter(batches), [], None
    meter.begin()
    while True:
        with meter.timing("data_wait"):
            following = next(batches, None)
        if following is None:
            assert batch is not None, "a step has at least one micro-step"
            return StepOutcome(batch.cursor, packs)
        batch = following
        try:
            pack = batch.pack.to(engine.device, non_blocking=True)
            engine.set_gradient_accumulation_boundary(batch.is_boundary)
            with meter.timing("forward"):
                sums = engine(pack)
            with meter.timing("backward"):
                share = meter.ranks.world_size / (batch.loss_weight if batch.num_supervised else 1.0)
                engine.backward(sums.total * share, scale_wrt_gas=False)
            with meter.timing("optimizer"):
                engine.step()
        except torch.OutOfMemoryError as error:
            raise RankError(_out_of_memory(batch, meter.ranks)) from error
        except RuntimeError as error:
            # A collective that timed out says nothing of where: this does.
            error.add_note(
                f"on rank {meter.ranks.rank} in optimizer step {batch.step + 1}, micro-step {batch.micro_step}"
            )
            raise
        meter.add_pack(pack, sums, is_dummy=batch.is_dummy, flops=batch.flops)
        packs.append((batch.record_ids, sums.total.detach()))


class SkipCounter:
    """Steps that ZeRO skipped because loss or gradient was not finite; so many in a row end the run."""

    def __init__(self, limit: int, total: int):
        self.limit, self.total, self.in_a_row = limit, total, 0

    def count(self, engine: Engine, outcome: StepOutcome, step: int) -> None:
        if not engine.optimizer.overflow:
            self.in_a_row = 0
            return
        self.total += 1
        self.in_a_row += 1
        bad = [ids for ids, loss in outcome.packs if not torch.isfinite(loss)] or [ids for ids, _ in outcome.packs]
        records = ", ".join(record for ids in bad for record in ids)
        logger.error("step %d skipped: loss or gradient not finite; records on this rank: %s", step + 1, records)
        if self.in_a_row >= self.limit:
            raise RankError(
                f"{self.in_a_row} steps in a row had a non-finite loss or gradient (optim.max_skipped_in_a_row="
                f"{self.limit}); lower optim.lr or look at the last step's records: {records}"
            )


def _out_of_memory(batch: MicroBatch, ranks: Ranks) -> str:
    pack, records = batch.pack, ", ".join(batch.record_ids)
    return (
        f"rank {ranks.rank}, step {batch.step + 1}: out of memory in a pack of {pack.num_tokens} tokens, "
        f"{pack.num_patches} patches, {pack.num_supervised} supervised (records {records}); lower data.pack_tokens or "
        "data.pack_patches, or set model.recompute_vit=1 and model.recompute_llm=1"
    )
