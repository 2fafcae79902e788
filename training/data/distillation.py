"""A student's pack with its teacher's side: the same samples on all tokens, or what the teacher said of them before.

N = supervised tokens of the pack, D = the teacher's width, k = entries of a top-k cache
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pixelprune.attention.prefixes import Group, groups_apart, groups_of_full
from pixelprune.pack import Pack, VisionGeometry, decoding_index, pack_samples, row_pictures
from pixelprune.records.prepare import PreparedRecord
from pixelprune.sample import Sample
from pixelprune.settings import MERGE
from training.data.targets import TargetReader
from training.errors import UserError


class AlignmentError(UserError):
    """Student and teacher would be compared at different tokens of a record."""


@dataclass(frozen=True)
class DistillationPack(Pack):
    """A pack that knows its teacher's side; either `full` is set, or the cached fields are.

    full: the same samples in the same order on all their tokens. Its `blocks` are empty and `block_index` set where
    the teacher's pixels are decoded from this pack's own.
    teacher_hidden: (N, D), final hidden states at the positions that predict the supervised tokens.
    teacher_log_probs, teacher_ids: (N, k), the most probable tokens at the temperature of the recipe.
    labelled: bool (N,), False for tokens that the student wrote itself, which are no labels; None where all are. Those
    are num_own_tokens of num_own samples, and own_weight the sum of their weights.
    """

    full: Pack | None = None
    teacher_hidden: torch.Tensor | None = None
    teacher_log_probs: torch.Tensor | None = None
    teacher_ids: torch.Tensor | None = None
    labelled: torch.Tensor | None = None
    num_own: int = 0
    num_own_tokens: int = 0
    own_weight: float = 0.0

    def tensors(self) -> Iterator[torch.Tensor]:
        yield from super().tensors()
        if self.full is not None:
            yield from self.full.tensors()

    def mapped(self, move) -> DistillationPack:
        full = None if self.full is None else self.full.mapped(move)
        return dataclasses.replace(super().mapped(move), full=full)

    def full_pack(self) -> Pack:
        """The teacher's row, its pixels taken from this pack where they did not travel a second time."""
        assert self.full is not None, "a cached teacher has no rows"
        if self.full.block_index is None:
            return self.full
        return dataclasses.replace(self.full, blocks=self.blocks)


def with_full_rows(
    pack: Pack,
    samples: list[Sample],
    full_samples: list[Sample],
    geometry: VisionGeometry,
    *,
    decode: bool,
    groups: Sequence[Group] | None = None,
    pictures: Sequence[int] | None = None,
) -> DistillationPack:
    """The pack of `samples` with the row of `full_samples` beside it.

    decode: the teacher's pixels are decoded from the pack's (recoverable pruning); otherwise they travel too.
    groups, pictures: those that the pack was made with; the teacher's row shares the same prefixes and encodes a
    picture of several places once, too. Pixels of its own may differ where the student's do not: they are told apart.
    Raises AlignmentError when a record's supervised tokens differ between the two.
    """
    for sample, full_sample in zip(samples, full_samples, strict=True):
        check_aligned(sample, full_sample)
    groups = groups_apart(len(samples)) if groups is None else groups
    full_groups = groups_of_full(groups, samples, full_samples)
    full_pictures = pictures  # equal kept blocks decode to equal images
    if pictures is not None and not decode:
        full_pictures = row_pictures(full_samples, full_groups)
    full = pack_samples(full_samples, geometry, full_groups, pictures=full_pictures)
    if decode:
        index = decoding_index(samples, groups, pictures)
        assert len(index) * MERGE * MERGE == full.num_patches, "every place of every image has a block"
        # Copied: an empty view would keep all pixels, and take them through shared memory.
        full = dataclasses.replace(full, blocks=full.blocks[:0].clone(), block_index=index)
    return DistillationPack(**_fields(pack), full=full)


def with_cached_targets(pack: Pack, records: list[PreparedRecord], targets: TargetReader) -> DistillationPack:
    """The pack of `records` (the dummy behind them has nothing supervised) with what the teacher said of them.

    Raises UserError for a record that the cache does not hold, or holds with other supervised tokens.
    """
    rows = [targets.read(record.content_hash, supervised_ids(record.sample), record.sample.record_id)
            for record in records]  # fmt: skip
    joined = {name: torch.cat([row[name] for row in rows]) for name in rows[0]} if rows else targets.empty()
    assert all(len(values) == pack.num_supervised for values in joined.values()), "one row per supervised token"
    return DistillationPack(**_fields(pack), **{f"teacher_{name}": values for name, values in joined.items()})


def check_aligned(sample: Sample, full_sample: Sample) -> None:
    """Raises AlignmentError unless both supervise the same token ids in the same order."""
    mine, other = supervised_ids(sample), supervised_ids(full_sample)
    if not np.array_equal(mine, other):
        raise AlignmentError(
            f"record {sample.record_id!r}: the student's row supervises {len(mine)} tokens and the teacher's "
            f"{len(other)}, or other ones; is an image part of an answer? Remove the record from data.sources"
        )


def supervised_ids(sample: Sample) -> np.ndarray:
    """The token ids that are trained on: int64 (num_supervised,)."""
    return sample.input_ids[sample.supervised]


def _fields(pack: Pack) -> dict:
    return {field.name: getattr(pack, field.name) for field in dataclasses.fields(pack)}
