"""Samples of a row that begin alike: the prefix stands in the row once, and each sample's suffix sees it and itself.

    S = samples of a row, L = tokens of a sample, P = tokens of a shared prefix (images as their kept blocks)

Exact, since attention is causal and every other layer works on single tokens: a prefix sees nothing of what follows
it, so it is computed once for all, and the gradients of all suffixes meet in it. What is equal is asked of the token
ids of whole tokenised texts, never of text: tokenising prefix and suffix apart would break merges.
Families with linear-attention layers, whose state runs along the row, compute it as a row of its own
(`pixelprune.attention.carried_state`).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
import xxhash

from pixelprune.attention.borders import Borders, Segment
from pixelprune.images.distinct import image_key
from pixelprune.sample import Sample

__all__ = [
    "Group",
    "Piece",
    "SharedPrefix",
    "find_groups",
    "groups_apart",
    "groups_of_full",
    "picture_hash",
    "picture_prefix",
    "pieces_of",
    "row_borders",
]

LEAST_SAVING = 1 / 8
"""Share of a group's tokens that must be saved. A template's first tokens are common to all samples of a row; sharing
those alone would save nothing and give every sample keys that have to be gathered."""


class Group(NamedTuple):
    """Samples of a row that share their first `prefix_len` tokens, in which `num_images` whole images stand."""

    members: tuple[int, ...]
    prefix_len: int = 0
    num_images: int = 0


class Piece(NamedTuple):
    """Tokens [start, stop) of a sample, with its images [images[0], images[1]), as one stretch of the row.

    prefix: the piece that it continues, a number in the row's list; None for a sample's beginning.
    """

    sample: int
    start: int
    stop: int
    images: tuple[int, int]
    prefix: int | None = None


class SharedPrefix(NamedTuple):
    """A prefix that stands in a row once for `num_samples`: what the others do not compute again, each."""

    num_samples: int
    kept_blocks: tuple[int, ...]
    """Of each of its images."""
    num_text_tokens: int

    @classmethod
    def of_group(cls, samples: Sequence[Sample], group: Group) -> SharedPrefix:
        images = samples[group.members[0]].images[: group.num_images]
        kept = tuple(image.selection.num_kept for image in images)
        return cls(len(group.members), kept, group.prefix_len - sum(kept))


def groups_apart(num_samples: int) -> tuple[Group, ...]:
    """Every sample on its own: the row without any sharing."""
    return tuple(Group((sample,)) for sample in range(num_samples))


def find_groups(samples: Sequence[Sample], image_token_id: int) -> tuple[Group, ...]:
    """Which samples of a row share which prefix, so that most tokens and kept blocks are saved.

    A prefix ends before the first image whose prepared pixels or places differ (all placeholders have one id), and one
    token before anything supervised, whose logits are each sample's own. Groups come in the order of their first
    members, members in the order of the row; a sample that shares nothing is a group of one.
    """
    keys: dict[int, int] = {}
    sequences = [_sequence(sample, image_token_id, keys) for sample in samples]
    # Sorted by their bytes, sequences with a common beginning stand beside each other.
    order = sorted(range(len(samples)), key=lambda sample: sequences[sample].tobytes())
    common = [_common_len(sequences[one], sequences[other]) for one, other in pairwise(order)]
    groups = []
    for start, stop in _best_ranges(common, [samples[sample] for sample in order], image_token_id):
        members = tuple(sorted(order[start:stop]))
        length = min(common[start : stop - 1], default=0)
        groups.append(Group(members, length, _num_images(samples[members[0]], image_token_id, length)))
    return tuple(sorted(groups))


def groups_of_full(
    groups: Sequence[Group], samples: Sequence[Sample], full_samples: Sequence[Sample]
) -> tuple[Group, ...]:
    """The same groups for the samples on all their tokens: prefixes hold every block of their images.

    Where full samples bring pixels of their own, a group of images that differ in omitted blocks is taken apart.
    """
    result: list[Group] = []
    for group in groups:
        first, pruned = full_samples[group.members[0]], samples[group.members[0]]
        pictures = first.images[: group.num_images]
        others = [full_samples[member].images[: group.num_images] for member in group.members[1:]]
        if all(np.array_equal(a.blocks, b.blocks) for other in others for a, b in zip(pictures, other, strict=True)):
            omitted = (
                full.selection.num_kept - kept.selection.num_kept
                for full, kept in zip(pictures, pruned.images, strict=False)
            )
            result.append(group._replace(prefix_len=group.prefix_len + sum(omitted)))
        else:
            result.extend(Group((member,)) for member in group.members)
    return tuple(sorted(result))


def pieces_of(samples: Sequence[Sample], groups: Sequence[Group]) -> list[Piece]:
    """The row: of each group its prefix, then what every member has behind it.

    Raises ValueError when the groups do not hold every sample once, or leave a member of several no token of its own.
    """
    if sorted(member for group in groups for member in group.members) != list(range(len(samples))):
        raise ValueError(f"groups: expected each of {len(samples)} samples once, got {list(groups)}")
    pieces: list[Piece] = []
    for members, prefix_len, num_images in groups:
        prefix = None
        if len(members) > 1 and prefix_len:
            prefix = len(pieces)
            pieces.append(Piece(members[0], 0, prefix_len, (0, num_images)))
        for member in members:
            sample, start, first_image = samples[member], 0, 0
            if prefix is not None:
                start, first_image = prefix_len, num_images
                if len(sample) <= start:
                    raise ValueError(f"groups: sample {member} of {len(sample)} tokens shares its first {prefix_len}")
            pieces.append(Piece(member, start, len(sample), (first_image, len(sample.images)), prefix))
    return pieces


def row_borders(pieces: Sequence[Piece]) -> Borders:
    """What the tokens of each piece see: the prefix it continues, then itself."""
    ends = list(accumulate(piece.stop - piece.start for piece in pieces))
    ranges = list(zip([0, *ends], ends, strict=False))
    return Borders(
        [
            Segment(own, (own,) if piece.prefix is None else (ranges[piece.prefix], own))
            for piece, own in zip(pieces, ranges, strict=True)
        ],
        is_causal=True,
    )


def picture_prefix(sample: Sample, image_token_id: int, keys: dict[int, int] | None = None) -> tuple[int, int]:
    """What stands up to the end of a sample's first image: its hash (63 bits, above 0) and its number of text tokens.

    keys: as of `image_key`, of the sample's images.
    Samples of one hash share at least that prefix. (0, 0) for a sample without an image, or with one that cannot be
    shared.
    """
    if not sample.images:
        return 0, 0
    kept = sample.images[0].selection.num_kept
    sequence = _sequence(sample, image_token_id, {} if keys is None else keys)
    end = int(np.flatnonzero(sample.input_ids == image_token_id)[kept - 1]) + 1
    if end > len(sequence):
        return 0, 0
    key = xxhash.xxh3_64(np.ascontiguousarray(sequence[:end]).data).intdigest() >> 1
    return max(key, 1), end - kept


def picture_hash(sample: Sample, keys: dict[int, int] | None = None) -> int:
    """Of a sample's first image alone, whatever stands before it (63 bits, above 0); 0 for a sample without one.

    keys: as of `image_key`, of the sample's images.
    """
    return -image_key(sample.images, 0, {} if keys is None else keys) if sample.images else 0


def _sequence(sample: Sample, image_token_id: int, keys: dict[int, int]) -> np.ndarray:
    """What may be shared of a sample: int64 (P, 4), per token its id, or its image's key, and its MRoPE position."""
    supervised = np.flatnonzero(sample.supervised)
    length = max(min(len(sample), int(supervised[0]) if len(supervised) else len(sample)) - 1, 0)
    ids, is_image = sample.input_ids.copy(), sample.input_ids == image_token_id
    kept = [image.selection.num_kept for image in sample.images]
    ids[is_image] = np.repeat([image_key(sample.images, number, keys) for number in range(len(kept))], kept)
    whole = int(np.cumsum([0, *kept])[_num_images(sample, image_token_id, length)])
    if whole < is_image[:length].sum():  # ends within an image, which is shared as a whole or not at all
        length = int(np.flatnonzero(is_image)[whole])
    return np.concatenate([ids[:, None], sample.position_ids.T], axis=1)[:length]


def _num_images(sample: Sample, image_token_id: int, length: int) -> int:
    """Images that end within the first `length` tokens."""
    num_tokens = int((sample.input_ids[:length] == image_token_id).sum())
    ends = list(accumulate(image.selection.num_kept for image in sample.images))
    return sum(end <= num_tokens for end in ends)


def _common_len(one: np.ndarray, other: np.ndarray) -> int:
    """Rows that two sequences (P, 4) have in common at their beginning."""
    length = min(len(one), len(other))
    differs = (one[:length] != other[:length]).any(axis=1)
    return int(differs.argmax()) if differs.any() else length


def _best_ranges(common: list[int], samples: list[Sample], image_token_id: int) -> list[tuple[int, int]]:
    """Neighbours that form a group, as ranges over samples in sorted order, each sample in one.

    common: tokens that each has in common with the next. A range shares the least of those in it. Dynamic programming
    over where the last range begins.
    """
    num_tokens = [0, *accumulate(map(len, samples))]
    # A kept block is a token of the language model, and about as much work in the vision tower.
    worth = [np.concatenate([[0], np.cumsum(1 + (sample.input_ids == image_token_id))]) for sample in samples]
    best, begins = [0.0], [0]
    for stop in range(1, len(samples) + 1):
        gains, shared = [(best[stop - 1], stop - 1)], len(samples[stop - 1])
        for start in range(stop - 2, -1, -1):
            shared = min(shared, common[start])
            if not shared:
                break
            saved = (stop - start - 1) * shared
            if saved >= LEAST_SAVING * (num_tokens[stop] - num_tokens[start]):
                gains.append((best[start] + (stop - start - 1) * float(worth[start][shared]), start))
        value, begin = max(gains)
        best.append(value)
        begins.append(begin)
    ranges, stop = [], len(samples)
    while stop:
        ranges.append((begins[stop], stop))
        stop = begins[stop]
    return ranges
