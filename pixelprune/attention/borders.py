"""Which tokens of a row see which: host integers, made where the row is made and handed on with it.

    T = tokens (or patches) of a row, n = queries of a segment, m = keys it sees

A row is cut into segments. Samples behind each other are segments that see themselves; a prefix that several suffixes
share is one more range of keys in each of theirs. The attention functions know segments, not what they stand for.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple


class Segment(NamedTuple):
    """Queries [start, stop) of the row, and the ranges of keys that they see, in the order of the positions.

    Causal: query i of n sees keys 0 .. m - n + i of the m in all ranges together (aligned at the lower right).
    """

    queries: tuple[int, int]
    keys: tuple[tuple[int, int], ...]


class Borders:
    """The segments of one row. They tile it from 0 on, and the last keys of a causal one are its own queries.

    An ordinary class, no frozen dataclass: torch.compile guards a dataclass's numbers and compiles again for every row.
    Raises ValueError for segments that leave a gap, see beyond the row or, if causal, do not end with themselves.
    """

    def __init__(self, segments: Sequence[Segment], *, is_causal: bool):
        self.segments = tuple(segments)
        self.is_causal = is_causal
        self.num_tokens = self.segments[-1].queries[1] if self.segments else 0
        self.lengths = tuple(stop - start for (start, stop), _ in self.segments)
        """Queries of each segment."""
        self.key_lengths = tuple(sum(last - first for first, last in keys) for _, keys in self.segments)
        """Keys that each segment sees."""
        self.are_apart = all(segment.keys == (segment.queries,) for segment in self.segments)
        """Every segment sees itself and nothing else: what cumulative lengths can say."""
        self._check()

    @classmethod
    def of_lengths(cls, lengths: Sequence[int], *, is_causal: bool) -> Borders:
        """Samples (causal) or images (not causal) behind each other, each seeing itself."""
        ranges = pairwise((0, *accumulate(lengths)))
        return cls([Segment(own, (own,)) for own in ranges], is_causal=is_causal)

    def _check(self) -> None:
        end = 0
        for queries, keys in self.segments:
            start, stop = queries
            if start != end or stop <= start:
                raise ValueError(f"borders: expected a segment from token {end} on, got queries {queries}")
            if any(not 0 <= first < last <= self.num_tokens for first, last in keys):
                raise ValueError(f"borders: queries {queries} see keys {keys} of a row of {self.num_tokens} tokens")
            if self.is_causal and (not keys or keys[-1] != queries):
                raise ValueError(f"borders: the last keys of a causal segment are its queries {queries}, got {keys}")
            end = stop

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, Borders) and (self.segments, self.is_causal) == (other.segments, other.is_causal)

    def __hash__(self) -> int:
        return hash((self.segments, self.is_causal))

    def __repr__(self) -> str:
        return f"Borders({list(self.segments)}, is_causal={self.is_causal})"
