"""What one optimizer step did, summed over ranks, and the running totals of a run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from pixelprune.pack import Pack
from pixelprune.records.collator import DUMMY_ID, DUMMY_TOKENS
from pixelprune.settings import MERGE
from training.distributed.ranks import Ranks
from training.loss.supervised import LossSums
from training.tracking.hardware import host_memory_gb, peak_flops, peak_memory_gb

_COUNTS = (
    "num_samples", "num_supervised", "kept_tokens", "full_tokens", "shared_tokens", "kept_blocks", "full_blocks",
    "encoded_blocks",
)  # fmt: skip
_TIMES = ("data_wait", "generate", "forward", "backward", "optimizer")
_OF_THE_HOST = ("data_wait", "generate")
"""Times in which the host waits itself, on a GPU too."""


@dataclass
class RunTotals:
    """Counts since the first step of the run; part of the checkpoint, so that a resumed run goes on counting."""

    num_samples: int = 0
    num_supervised: int = 0
    kept_tokens: int = 0
    full_tokens: int = 0
    shared_tokens: int = 0
    kept_blocks: int = 0
    full_blocks: int = 0
    encoded_blocks: int = 0


class StepMeter:
    """Collects a step on this rank; `finish` reduces it over all ranks and empties the meter.

    Loss sums stay on the device until `finish`, the one place where this meter makes the host wait. Times are the
    host's on a CPU; on a GPU, where the host only queues the work, they are the device's (but for data_wait).
    """

    def __init__(self, ranks: Ranks, totals: RunTotals | None = None):
        self.ranks = ranks
        self.totals = totals or RunTotals()
        self._reset()

    def begin(self) -> None:
        """The step's clock starts now: what was done since the last step (saving, evaluating) is no part of it."""
        self._started = time.perf_counter()

    def _reset(self) -> None:
        self._losses: torch.Tensor | None = None
        self._counts = dict.fromkeys(_COUNTS, 0)
        self._times = dict.fromkeys(_TIMES, 0.0)
        self._marks: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._flops = 0.0
        self._loss_weight = 0.0
        self._own = dict.fromkeys(("num_own", "num_own_tokens", "own_weight"), 0.0)
        self.begin()

    def add_pack(self, pack: Pack, sums: LossSums, *, is_dummy: bool, flops: float = 0.0) -> None:
        losses = torch.stack([part.detach().float() for part in sums])
        self._losses = losses if self._losses is None else self._losses + losses
        # What the dummy adds, in a pack of its own or behind text-only samples, is not work done.
        has_dummy = int(DUMMY_ID in pack.record_ids)
        self._flops += 0.0 if is_dummy else flops
        self._loss_weight += pack.loss_weight
        for name in self._own:  # of packs with a teacher alone
            self._own[name] += getattr(pack, name, 0)
        self._counts["num_samples"] += pack.num_samples - has_dummy
        self._counts["num_supervised"] += pack.num_supervised
        self._counts["kept_tokens"] += pack.num_tokens - has_dummy * DUMMY_TOKENS
        self._counts["full_tokens"] += pack.num_full_tokens - has_dummy * DUMMY_TOKENS
        self._counts["shared_tokens"] += pack.num_shared_tokens
        self._counts["kept_blocks"] += pack.num_kept_blocks - has_dummy
        self._counts["full_blocks"] += pack.num_full_blocks - has_dummy
        self._counts["encoded_blocks"] += pack.num_patches // (MERGE * MERGE) - has_dummy

    @contextmanager
    def timing(self, name: str) -> Iterator[None]:
        """Adds the time of what is done in it to one of the parts of a step; generation is done while data is awaited,
        and no part of that."""
        if self.ranks.device.type == "cuda" and name not in _OF_THE_HOST:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._marks.append((name, start, end))
        else:
            started = time.perf_counter()
            yield
            seconds = time.perf_counter() - started
            self._times[name] += seconds
            if name == "generate":
                self._times["data_wait"] -= seconds

    def finish(self) -> dict[str, float]:
        """Metrics of the step over all ranks, per-token losses included. Synchronises with the device once."""
        assert self._losses is not None, "a step has at least one micro-step on every rank"
        losses = self._losses.double().cpu()
        for name, start, end in self._marks:  # recorded before the losses were copied, so the device has passed them
            self._times[name] += start.elapsed_time(end) / 1000
        mine = [*self._counts.values(), *self._times.values(), self._flops, self._loss_weight, *self._own.values()]
        vector = torch.cat([losses, torch.tensor(mine, dtype=torch.float64)])
        vector = self.ranks.sum(vector)
        slowest = self.ranks.max(torch.tensor(self._flops, dtype=torch.float64))
        step_seconds = time.perf_counter() - self._started
        names = [*LossSums._fields, *_COUNTS, *_TIMES, "flops", "loss_weight", *self._own]
        sums = dict(zip(names, vector.tolist(), strict=True))
        metrics = self._metrics(sums, step_seconds, slowest.item())
        self._reset()
        return metrics

    def _metrics(self, sums: dict[str, float], step_seconds: float, slowest_flops: float) -> dict[str, float]:
        for name in _COUNTS:
            setattr(self.totals, name, getattr(self.totals, name) + int(sums[name]))
        num, weight = max(1.0, sums["num_supervised"]), sums["loss_weight"] or 1.0
        num_labels = max(1.0, sums["num_supervised"] - sums["num_own_tokens"])
        rank_seconds = step_seconds * self.ranks.world_size
        metrics = {
            "loss": sums["total"] / weight,
            "ce": sums["ce"] / ((weight - sums["own_weight"]) or 1.0),
            "kl": sums["kl"] / weight,
            "teacher_agreement": sums["num_agree"] / num,
            "teacher_entropy": sums["teacher_entropy"] / num,
            "token_accuracy": sums["num_correct"] / num_labels,
            "num_samples": sums["num_samples"],
            "num_supervised": sums["num_supervised"],
            "samples_per_s": sums["num_samples"] / step_seconds,
            "kept_tokens_per_s": sums["kept_tokens"] / step_seconds,
            "full_tokens_per_s": sums["full_tokens"] / step_seconds,
            "retain_ratio": self.retain_ratio,
            # Of the records' kept tokens, those that a shared prefix left to be computed by another record.
            "shared_prefix": sums["shared_tokens"] / max(1.0, sums["kept_tokens"] + sums["shared_tokens"]),
            # Of the records' kept blocks, those that the vision tower did not see again.
            "shared_vision": 1 - sums["encoded_blocks"] / sums["kept_blocks"] if sums["kept_blocks"] else 0.0,
            "step_s": step_seconds,
            "peak_memory_gb": peak_memory_gb(self.ranks.device),
            "host_memory_gb": host_memory_gb(),
        }
        if sums["num_own"]:
            metrics["on_policy_share"] = sums["num_own"] / sums["num_samples"]
            metrics["on_policy_tokens"] = sums["num_own_tokens"] / sums["num_own"]
        if peak := peak_flops(self.ranks.device):
            # Kept tokens only: omitted ones and padding are no work.
            metrics["mfu"] = sums["flops"] / rank_seconds / peak
        metrics |= {f"{name}_share": sums[name] / rank_seconds for name in _TIMES}
        if slowest_flops:
            metrics["rank_imbalance"] = 1 - sums["flops"] / (slowest_flops * self.ranks.world_size)
        return metrics

    @property
    def retain_ratio(self) -> float:
        """Sum of kept blocks / sum of all blocks since the run began (1 when there was no image)."""
        return self.totals.kept_blocks / self.totals.full_blocks if self.totals.full_blocks else 1.0
