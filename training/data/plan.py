"""Which record is trained on in which optimizer step, micro-step and rank: a pure function, without torch.

`PlanInput` holds what the index measured, one row per record; `plan_epoch` turns it into an `EpochPlan`. The order of
records, and which of them share an optimizer step, depends on (records, seed, epoch, samples per step) alone: the
number of ranks and the caps only decide how a step is cut into packs. That is what lets a run continue on another
number of ranks with exactly the samples it has not seen.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise

import numpy as np

from training.data.balance import Caps, PrefixColumns, pack_groups, pack_step

FINEST_SHARE = 1 << 24
"""A source's fractional weight is read as the nearest a / b with b up to this: 0.3333 written for 1/3 stays 0.3333."""


@dataclass(frozen=True)
class PlanInput:
    """One row per usable record (n of them), in the order of the index.

    tokens, patches: int64 (n,), what counts against the caps; cost: float64 (n,), FLOPs of one pass over the sample.
    num_supervised: int64 (n,). loss_weight: float64 (n,), sum of the weights of these tokens. copies: float64 (n,),
    uses per epoch. source: int (n,), which source a record is of. prefixes, pictures: of records that begin alike up to
    their first image, and of records with one first image, whatever stands before it; needed by plans that share them.
    """

    tokens: np.ndarray
    patches: np.ndarray
    cost: np.ndarray
    num_supervised: np.ndarray
    loss_weight: np.ndarray
    copies: np.ndarray
    source: np.ndarray
    prefixes: PrefixColumns | None = None
    pictures: PrefixColumns | None = None

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class PlanSettings:
    """The part of the data settings that a plan depends on."""

    samples_per_step: int
    pack_tokens: int
    pack_patches: int
    shuffle: bool = True
    seed: int = 0
    max_shared: int = 0
    """Records of one screenshot that meet in a step; 0: the order is drawn over records, whatever they share."""
    over_pictures: bool = False
    """Records of one screenshot are those of one first image, and share the vision tower alone; otherwise those that
    begin alike up to its end, and share all of it."""

    def __post_init__(self):
        for name in ("samples_per_step", "pack_tokens", "pack_patches"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name} is {getattr(self, name)}, expected at least 1")


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step.

    rows: int64 (S,), records in epoch order. bins: int32 (S,), micro_step * world_size + rank of each.
    """

    rows: np.ndarray
    bins: np.ndarray
    num_micro_steps: int
    world_size: int
    num_supervised: int
    loss_weight: float
    """Sum of the weights of the step's supervised tokens: what the loss is divided by."""
    cost: np.ndarray
    """FLOPs (micro-steps, ranks)."""
    apart_cost: np.ndarray
    """The same if every sample was computed for itself: equal to `cost` where the plan shares nothing."""

    @property
    def num_samples(self) -> int:
        return len(self.rows)

    @property
    def micro_steps(self) -> list[list[np.ndarray]]:
        """micro_steps[m][rank] is the rows of that pack; an empty one is a rank without work."""
        order = np.argsort(self.bins, kind="stable")
        edges = np.searchsorted(self.bins[order], np.arange(self.num_micro_steps * self.world_size + 1))
        packs = [self.rows[order[a:b]] for a, b in pairwise(edges)]
        return [packs[m * self.world_size : (m + 1) * self.world_size] for m in range(self.num_micro_steps)]


class EpochPlan:
    """All optimizer steps of an epoch, packed step by step when asked for: a step costs milliseconds, not the start."""

    def __init__(self, inputs: PlanInput, settings: PlanSettings, epoch: int, world_size: int):
        self.inputs, self.settings, self.epoch, self.world_size = inputs, settings, epoch, world_size
        self.order = order_of(inputs, settings, epoch)
        # The loader asks for a step twice: when it hands out tasks and, a few steps later, when they are done.
        self._step = lru_cache(maxsize=32)(self._pack)

    @property
    def num_samples(self) -> int:
        return len(self.order)

    def __len__(self) -> int:
        return -(-len(self.order) // self.settings.samples_per_step)

    def __iter__(self) -> Iterator[StepPlan]:
        return (self[step] for step in range(len(self)))

    def rows_of_step(self, step: int) -> np.ndarray:
        size = self.settings.samples_per_step
        return self.order[step * size : (step + 1) * size]

    def __getitem__(self, step: int) -> StepPlan:
        if not 0 <= step < len(self):
            raise IndexError(f"step {step} of an epoch of {len(self)} steps")
        return self._step(step)

    def _pack(self, step: int) -> StepPlan:
        rows, settings = self.rows_of_step(step), self.settings
        tokens, patches, cost = (column[rows] for column in (self.inputs.tokens, self.inputs.patches, self.inputs.cost))
        caps = Caps(self.world_size, settings.pack_tokens, settings.pack_patches)
        if settings.max_shared:
            shared = _shared_columns(self.inputs, settings).of(rows)
            bins, num_micro, loads = pack_groups(tokens, patches, cost, shared, caps)
            apart = self._loads(cost, bins, num_micro)
        else:
            bins, num_micro = pack_step(tokens, patches, cost, **caps._asdict())
            apart = loads = self._loads(cost, bins, num_micro)
        num_supervised = int(self.inputs.num_supervised[rows].sum())
        loss_weight = float(self.inputs.loss_weight[rows].sum())
        return StepPlan(rows, bins, num_micro, self.world_size, num_supervised, loss_weight, loads, apart)

    def _loads(self, cost: np.ndarray, bins: np.ndarray, num_micro: int) -> np.ndarray:
        """Sums of the packs' costs: float64 (micro-steps, ranks)."""
        return np.bincount(bins, weights=cost, minlength=num_micro * self.world_size).reshape(num_micro, -1)


def plan_epoch(inputs: PlanInput, settings: PlanSettings, *, epoch: int, world_size: int) -> EpochPlan:
    """The plan of one epoch. Raises ValueError when the weights leave no sample at all."""
    plan = EpochPlan(inputs, settings, epoch, world_size)
    if not len(plan):
        raise ValueError(f"epoch {epoch} holds no sample: {len(inputs)} usable records, weights too small (weight)")
    return plan


def order_of(inputs: PlanInput, settings: PlanSettings, epoch: int) -> np.ndarray:
    """Rows in the order of an epoch, drawn as the settings say: int64 (N,)."""
    order = epoch_order(inputs, seed=settings.seed, epoch=epoch, shuffle=settings.shuffle)
    if not settings.max_shared:
        return order
    return order_over_groups(order, _shared_columns(inputs, settings).group[order], settings, epoch)


def _shared_columns(inputs: PlanInput, settings: PlanSettings) -> PrefixColumns:
    columns = inputs.pictures if settings.over_pictures else inputs.prefixes
    assert columns is not None, "a plan over screenshots needs to know them"
    return columns


def order_over_groups(order: np.ndarray, group: np.ndarray, settings: PlanSettings, epoch: int) -> np.ndarray:
    """The rows of `order` so that those of one group follow each other, `max_shared` of them at most: int64 (N,).

    group: int64 (N,), of each row of the order, which also decides which rows of a group are together. Several uses of
    one record, and the parts of a group that is cut, meet in a step only where the others are used up.
    """
    # Copies of a record are one behind the other after a stable sort: the k-th copy goes into the k-th round.
    by_row = np.argsort(order, kind="stable")
    starts = np.flatnonzero(np.diff(order[by_row], prepend=-1))
    rounds = np.empty(len(order), dtype=np.int64)
    rounds[by_row] = np.arange(len(order)) - np.repeat(starts, np.diff(starts, append=len(order)))
    places = np.lexsort((np.arange(len(order)), rounds, group))
    edges = np.flatnonzero(np.diff(group[places], prepend=-1) | np.diff(rounds[places], prepend=-1))
    units = [
        places[start : min(start + settings.max_shared, stop)]
        for first, stop in pairwise([*edges.tolist(), len(places)])
        for start in range(first, stop, settings.max_shared)
    ]
    if settings.shuffle:
        drawn = np.random.default_rng([settings.seed, epoch, 3]).permutation(len(units)).tolist()
    else:
        drawn = sorted(range(len(units)), key=lambda unit: int(units[unit].min()))
    names = [int(group[unit[0]]) for unit in units]
    return order[np.concatenate([units[unit] for unit in _apart(drawn, names, units, settings.samples_per_step)])]


def _apart(drawn: list[int], names: list[int], units: list[np.ndarray], step_size: int) -> list[int]:
    """The units as drawn, but one whose group is in the step already waits for the next."""
    result, waiting, pending = list[int](), list[int](), deque(drawn)
    used, present = 0, set[int]()
    while pending or waiting:
        chosen = next((unit for unit in waiting if names[unit] not in present), None)
        if chosen is not None:
            waiting.remove(chosen)
        elif pending:
            chosen = pending.popleft()
            if names[chosen] in present:
                waiting.append(chosen)
                continue
        else:
            chosen = waiting.pop(0)
        result.append(chosen)
        used += len(units[chosen])
        present.add(names[chosen])
        if used >= step_size:  # what is left of the last unit begins the next step
            used %= step_size
            present = {names[chosen]} if used else set()
    return result


def epoch_order(inputs: PlanInput, *, seed: int, epoch: int, shuffle: bool = True) -> np.ndarray:
    """Rows in the order of an epoch, every record as often as its weight says: int64 (N,)."""
    rows = np.repeat(np.arange(len(inputs)), draw_copies(inputs, seed=seed, epoch=epoch))
    if shuffle:
        rows = rows[np.random.default_rng([seed, epoch, 1]).permutation(len(rows))]
    return rows


def draw_copies(inputs: PlanInput, *, seed: int, epoch: int) -> np.ndarray:
    """How often each record is used in an epoch: int64 (n,), the whole part of its copies or one more.

    The fractions of a source's records are laid end to end in a seeded order, and a record gets one more copy where a
    whole number falls into its stretch (systematic sampling): the total is the weight's, rounded. Every epoch moves
    on by one record's mean fraction, so that a source of weight 1/k is used up exactly once in k epochs.
    """
    copies = np.floor(inputs.copies).astype(np.int64)
    fractions = inputs.copies - copies
    for source in np.unique(inputs.source):
        rows = np.flatnonzero((inputs.source == source) & (fractions > 0))
        if not len(rows):
            continue
        rows = np.random.default_rng([seed, int(source), 2]).permutation(rows)
        parts, unit = _in_units(fractions[rows])
        ends = np.cumsum(parts)
        shift = (epoch * int(ends[-1] // len(rows))) % unit
        copies[rows] += (ends + shift) // unit - (ends - parts + shift) // unit
    return copies


def _in_units(fractions: np.ndarray) -> tuple[np.ndarray, int]:
    """Fractions as whole numbers of a unit, 1 / the second result: integer sums have no rounding to lose records by."""
    if np.all(fractions == fractions[0]):
        exact = Fraction(float(fractions[0])).limit_denominator(FINEST_SHARE)
        return np.full(len(fractions), exact.numerator, dtype=np.int64), exact.denominator
    return np.rint(fractions * float(1 << 32)).astype(np.int64), 1 << 32


def num_steps(inputs: PlanInput, settings: PlanSettings, epoch: int) -> int:
    """Optimizer steps of an epoch, without planning it."""
    return -(-int(draw_copies(inputs, seed=settings.seed, epoch=epoch).sum()) // settings.samples_per_step)
