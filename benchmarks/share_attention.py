"""Attention of a row with a shared prefix: keys gathered for every suffix, or two calls merged by their log-sum-exp.

    python -m benchmarks.share_attention [--rounds 5]

Gathered is what training runs (`pixelprune.attention.segments`): each suffix's keys are a copy of the prefix's and its
own. Merged is the alternative, written here: all suffixes' queries over the prefix in one call and over themselves in
one each, put together by their log-sum-exp, with a backward of its own that hands every part the whole's output and
log-sum-exp. Both run torch's flash kernel for CPUs in float32; apart is the same samples without sharing. Forward and
backward of one layer in turns, CPU time, medians; bytes are those that a layer keeps for its backward pass.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from itertools import accumulate, pairwise
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.parts.record import markdown_table, write_record
from pixelprune.attention.borders import Borders, Segment
from pixelprune.attention.segments import segment_attention

FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
HEADS = {"toy": (6, 2, 32), "2b": (16, 8, 128)}
"""Heads of queries, of keys, and their width, as of a toy and of Qwen3-VL-2B."""
CASES = (("toy", 100, 16), ("toy", 400, 2), ("toy", 400, 8), ("toy", 400, 16), ("toy", 1500, 16), ("2b", 400, 16),
         ("2b", 1500, 16))  # fmt: skip
"""Heads, tokens of the prefix, suffixes."""
TOLERANCE = 1e-5
Rows = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Merged(torch.autograd.Function):
    """query (1, H, T, E), key and value (1, H_kv, T, E) of a row that begins with its prefix -> (1, H, T, E)."""

    @staticmethod
    def forward(ctx: Any, query, key, value, prefix_len: int, lengths: list[int]):
        k, v = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
        out, lse = torch.empty_like(query), query.new_empty(query.shape[:3])
        prefix, rest = slice(0, prefix_len), slice(prefix_len, query.shape[2])
        for seen, is_causal in ((prefix, True), (rest, False)):
            parts = FORWARD(query[:, :, seen], k[:, :, prefix], v[:, :, prefix], 0.0, is_causal)
            out[:, :, seen], lse[:, :, seen] = parts
        for own in _slices(prefix_len, lengths):
            part, own_lse = FORWARD(query[:, :, own], k[:, :, own], v[:, :, own], 0.0, True)
            whole = torch.logaddexp(lse[:, :, own], own_lse)
            weights = [(one - whole).exp()[..., None] for one in (lse[:, :, own], own_lse)]
            out[:, :, own] = weights[0] * out[:, :, own] + weights[1] * part
            lse[:, :, own] = whole
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.prefix_len, ctx.lengths = prefix_len, lengths
        return out

    @staticmethod
    def backward(ctx: Any, gradient):
        query, key, value, out, lse = ctx.saved_tensors
        group = query.shape[1] // key.shape[1]
        k, v = (x.repeat_interleave(group, 1) for x in (key, value))
        d_query, d_key, d_value = (torch.zeros_like(x) for x in (query, k, v))
        prefix, rest = slice(0, ctx.prefix_len), slice(ctx.prefix_len, query.shape[2])
        own = [(piece, piece, True) for piece in _slices(ctx.prefix_len, ctx.lengths)]
        for q, seen, is_causal in [(prefix, prefix, True), (rest, prefix, False), *own]:
            parts = BACKWARD(
                gradient[:, :, q], query[:, :, q], k[:, :, seen], v[:, :, seen], out[:, :, q],
                lse[:, :, q].contiguous(), 0.0, is_causal,
            )  # fmt: skip
            for whole, at, part in zip((d_query, d_key, d_value), (q, seen, seen), parts, strict=True):
                whole[:, :, at] += part
        grouped = [x.view(1, key.shape[1], group, *key.shape[2:]).sum(2) for x in (d_key, d_value)]
        return d_query, *grouped, None, None


def _slices(start: int, lengths: list[int]) -> list[slice]:
    return [slice(*edges) for edges in pairwise(accumulate(lengths, initial=start))]


def ways_of(heads: tuple[int, int, int], prefix_len: int, lengths: list[int]) -> dict[str, tuple[int, Callable]]:
    """Tokens of the row, and a function of query, key and value that gives (1, T, H, E)."""
    module = SimpleNamespace(is_causal=True, num_key_value_groups=heads[0] // heads[1], training=True)
    prefix, *suffixes = list(pairwise(accumulate((prefix_len, *lengths), initial=0)))
    shared = [Segment(prefix, (prefix,)), *(Segment(own, (prefix, own)) for own in suffixes)]
    borders = Borders(shared, is_causal=True)
    apart = Borders.of_lengths([prefix_len + length for length in lengths], is_causal=True)

    def by_segment(borders: Borders) -> Callable:
        return lambda *rows: segment_attention(module, *rows, None, row_borders=borders)[0]  # type: ignore[arg-type]

    return {
        "apart": (apart.num_tokens, by_segment(apart)),
        "gathered": (borders.num_tokens, by_segment(borders)),
        "merged": (borders.num_tokens, lambda *rows: Merged.apply(*rows, prefix_len, lengths).transpose(1, 2)),
    }


def rows_of(heads: tuple[int, int, int], num_tokens: int) -> Rows:
    generator = torch.Generator().manual_seed(0)
    counts = (heads[0], heads[1], heads[1])
    query, key, value = (torch.randn(1, n, num_tokens, heads[2], generator=generator) for n in counts)
    return query, key, value


def timed(function: Callable, rows: Rows) -> tuple[float, list[torch.Tensor]]:
    """CPU seconds of forward and backward; the output and the gradients."""
    leaves = [row.clone().requires_grad_() for row in rows]
    begun = time.process_time()
    out = function(*leaves)
    out.backward(torch.ones_like(out))
    return time.process_time() - begun, [out.detach(), *(leaf.grad for leaf in leaves)]  # type: ignore[list-item]


def kept_bytes(function: Callable, rows: Rows) -> int:
    """Of the tensors that wait for the backward pass."""
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = function(*(row.clone().requires_grad_() for row in rows))
    del out
    return sum(kept.values())


def measure(name: str, prefix_len: int, num: int, rounds: int) -> dict[str, Any]:
    lengths = [32 + 5 * number % 17 for number in range(num)]
    ways = ways_of(HEADS[name], prefix_len, lengths)
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    found: dict[str, list[torch.Tensor]] = {}
    for number in range(rounds + 1):
        for way, (num_tokens, function) in ways.items():
            took, found[way] = timed(function, rows_of(HEADS[name], num_tokens))
            if number:
                seconds[way].append(took)
    pairs = zip(found["merged"], found["gathered"], strict=True)
    difference = max(float((a - b).norm() / b.norm()) for a, b in pairs)
    if difference > TOLERANCE:
        raise SystemExit(f"merged is not the attention of gathered: {difference:.1e}")
    kept = {way: kept_bytes(function, rows_of(HEADS[name], tokens)) for way, (tokens, function) in ways.items()}
    middle = {way: statistics.median(values) for way, values in seconds.items()}
    case = {"heads": name, "prefix": prefix_len, "suffixes": num, "tokens": sum(lengths)}
    return case | {"seconds": middle, "kept_bytes": kept, "difference": difference}


def table_of(rows: list[dict[str, Any]]) -> str:
    def cells(row: dict[str, Any]) -> dict[str, Any]:
        seconds, kept = row["seconds"], row["kept_bytes"]
        found = {f"{way} ms": f"{1000 * seconds[way]:.1f}" for way in seconds}
        found["gathered over merged"] = f"{seconds['gathered'] / seconds['merged']:.2f}x"
        found |= {f"{way} keeps MB": f"{kept[way] / 1e6:.1f}" for way in kept}
        return found | {"keeps, gathered over merged": f"{kept['gathered'] / kept['merged']:.1f}x"}

    columns = ("heads", "prefix", "suffixes", "tokens")
    return markdown_table([{name: row[name] for name in columns} | cells(row) for row in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds")
    parser.add_argument("--no-record", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = [measure(*case, arguments.rounds) for case in CASES]
    sentence = (
        f"One layer's attention, forward and backward, float32, one thread, {arguments.rounds} rounds in turns, "
        "medians of CPU time. tokens: of all suffixes together. Largest difference of merged to gathered, outputs and "
        f"gradients, in norm: {max(row['difference'] for row in rows):.1e}."
    )
    table = table_of(rows)
    print(sentence + "\n\n" + table)
    if not arguments.no_record:
        write_record("share_attention", {"rounds": arguments.rounds, "rows": rows}, sentence + "\n\n" + table)


if __name__ == "__main__":
    main()
