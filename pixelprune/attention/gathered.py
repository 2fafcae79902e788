"""Keys and values laid out as each segment sees them, for kernels that know one border for queries, another for keys.

    T = tokens of a row, M = keys of all its segments together, H_kv = heads of keys, E = head width

A kernel over rows with borders takes queries and keys of different length per segment, but one run of keys for each. A
prefix that several suffixes share is therefore copied in front of each of them, in every layer.
"""

from __future__ import annotations

from typing import Any

import torch

from pixelprune.attention.borders import Borders

__all__ = ["gather_keys"]


@torch.compiler.disable  # its loop would be unrolled: a version for every number of segments
def gather_keys(x: torch.Tensor, borders: Borders) -> torch.Tensor:
    """Keys or values (T, H_kv, E) -> (M, H_kv, E): what each segment sees, segment behind segment."""
    gathered: torch.Tensor = _Gather.apply(x, borders)
    return gathered


class _Gather(torch.autograd.Function):
    """Copies of ranges. The gradient of a prefix is summed over its suffixes in float32, in their order: autograd would
    add them up in bfloat16, and an index with repeats in no order at all."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, borders: Borders) -> torch.Tensor:
        ctx.borders, ctx.num = borders, len(x)
        return torch.cat([x[first:last] for _, ranges in borders.segments for first, last in ranges])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        exact = torch.promote_types(gradient.dtype, torch.float32)
        total, start = gradient.new_zeros((ctx.num, *gradient.shape[1:]), dtype=exact), 0
        for _, ranges in ctx.borders.segments:
            for first, last in ranges:
                total[first:last] += gradient[start : start + last - first]
                start += last - first
        return total.to(gradient.dtype), None
