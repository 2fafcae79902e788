"""The samples of a pack whose answers the student is still to write, and the pack that is made of them then.

L = tokens of a pruned row, n = tokens of an answer
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import xxhash

from pixelprune.attention.prefixes import find_groups
from pixelprune.pack import VisionGeometry, pack_samples, row_pictures
from pixelprune.sample import Sample
from training.data.distillation import DistillationPack, with_full_rows


@dataclass(frozen=True)
class Draft:
    """samples: as the student sees them, full_samples: the same on all tokens, with the records' own answers.

    is_asked: whether the student answers a sample. decode: as of `with_full_rows`. share_prefix: samples that begin
    alike stand on one prefix. share_vision: a picture of several places of the row is encoded once.
    """

    samples: list[Sample]
    full_samples: list[Sample]
    is_asked: tuple[bool, ...]
    geometry: VisionGeometry
    decode: bool
    share_prefix: bool
    share_vision: bool = False

    def prompts(self) -> dict[int, Sample]:
        """Number of a sample that the student answers -> its prompt."""
        asked = (number for number, is_asked in enumerate(self.is_asked) if is_asked)
        prompts = ((number, prompt_of(self.samples[number], self.geometry.image_token_id)) for number in asked)
        return {number: prompt for number, prompt in prompts if prompt is not None}

    def packed(self, answers: Mapping[int, Sequence[int]]) -> DistillationPack:
        """The pack with these answers (token ids by number of the sample) in place of the records' own."""
        samples, full_samples = list(self.samples), list(self.full_samples)
        for number, ids in answers.items():
            samples[number] = with_answer(samples[number], ids)
            full_samples[number] = with_answer(full_samples[number], ids)
        groups = find_groups(samples, self.geometry.image_token_id) if self.share_prefix else None
        pictures = row_pictures(samples, groups) if self.share_vision else None
        pack = pack_samples(samples, self.geometry, groups, pictures=pictures)
        pack = with_full_rows(
            pack, samples, full_samples, self.geometry, decode=self.decode, groups=groups, pictures=pictures
        )
        own = [samples[number] for number in answers]
        labelled = [np.full(sample.num_supervised, number not in answers) for number, sample in enumerate(samples)]
        return dataclasses.replace(
            pack,
            labelled=torch.from_numpy(np.concatenate(labelled)),
            num_own=len(own),
            num_own_tokens=sum(sample.num_supervised for sample in own),
            own_weight=sum(sample.loss_weight for sample in own),
        )


def prompt_of(sample: Sample, image_token_id: int) -> Sample | None:
    """Everything before the last answer that is trained on; None where an image stands behind it, which the record's
    own answer has to lead to."""
    start = _last_answer(sample)
    if (sample.input_ids[start:] == image_token_id).any():
        return None
    return dataclasses.replace(
        sample,
        input_ids=sample.input_ids[:start],
        position_ids=sample.position_ids[:, :start],
        supervised=np.zeros(start, dtype=bool),
        weights=None,
        next_position=int(sample.position_ids[0, start - 1]) + 1,
    )


def with_answer(sample: Sample, ids: Sequence[int]) -> Sample:
    """The sample with other token ids in place of its last answer and all behind it; they alone are supervised.

    Each weighs what the first token of the record's own answer did.
    """
    start = _last_answer(sample)
    first = int(sample.position_ids[0, start - 1]) + 1
    positions = np.broadcast_to(np.arange(first, first + len(ids)), (3, len(ids)))
    length = start + len(ids)
    weights = None
    if sample.weights is not None:
        weights = np.zeros(length, dtype=np.float32)
        weights[start:] = sample.weights[start]
    return dataclasses.replace(
        sample,
        input_ids=np.concatenate([sample.input_ids[:start], np.asarray(ids, dtype=np.int64)]),
        position_ids=np.concatenate([sample.position_ids[:, :start], positions], axis=1),
        supervised=np.arange(length) >= start,
        weights=weights,
        next_position=first + len(ids),
    )


def _last_answer(sample: Sample) -> int:
    """Where the last run of supervised tokens begins."""
    begins = sample.supervised & ~np.concatenate([[False], sample.supervised[:-1]])
    return int(np.flatnonzero(begins)[-1])


def is_chosen(share: float, *numbers: int) -> bool:
    """Whether a share of this size takes the thing with these numbers; for all ranks and any packing the same."""
    return xxhash.xxh3_64(repr(numbers).encode()).intdigest() < share * 2**64
