"""Attention alone, forward and backward of one layer over a packed row, by each backend that runs here.

    python -m benchmarks.attention --device cuda

Rows of four screenshots of 3.5 megapixels at the widths of Qwen3-VL-2B, whole and at 40 % of their blocks: 3,480 and
1,440 tokens a sample in the language model, 13,616 and 5,448 patches an image in the vision tower. What is called is
what the model's layers call. FLOPs: 3.5 x 4 x width x heads x n^2 a sample (forward, and 2.5 times that backward),
half of it where causal.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.parts.record import markdown_table, write_record
from pixelprune.attention.borders import Borders
from training.composition.toy import build_toy_model
from training.config.settings import ATTENTION_NAMES
from training.diagnosis.check import Bench, milliseconds
from training.model.attention import load_pretrained, obstacle
from training.model.attention_check import Heads, attention_of

TEXT, VISION = Heads("language model", 16, 8, 128, True), Heads("vision tower", 16, 16, 64, False)
ROWS = {
    "language model, full": (TEXT, 3480),
    "language model, 40 %": (TEXT, 1440),
    "vision tower, full": (VISION, 13616),
    "vision tower, 40 %": (VISION, 5448),
}
NUM_SAMPLES = 4
LEFT_OUT = ("auto", "eager")
"""eager is the definition for comparisons: its (n, n) scores of 13,616 patches are 12 GB a layer."""


def measure(bench: Bench, attention: str, shorten: int) -> dict[str, dict[str, float]]:
    """Milliseconds and TFLOP/s of every row, by one backend."""
    folder = bench.scratch / "toy"
    if not folder.exists():
        build_toy_model(folder)
    dtype, found = torch.bfloat16, {}
    model = load_pretrained(str(folder), attention=attention, dtype=dtype)
    for name, (heads, length) in ROWS.items():
        lengths = [max(1, length // shorten)] * NUM_SAMPLES
        attend = attention_of(model, heads, Borders.of_lengths(lengths, is_causal=heads.is_causal), bench.device)
        rows = [
            torch.randn(sum(lengths), number, heads.width, device=bench.device, dtype=dtype, requires_grad=True)
            for number in (heads.heads, heads.kv_heads, heads.kv_heads)
        ]

        def both_ways(attend: Any = attend, rows: Any = rows) -> None:
            attend(*rows).sum().backward()

        took = milliseconds(bench, both_ways)
        flops = 3.5 * 4 * heads.width * heads.heads * sum(n * n for n in lengths) * (0.5 if heads.is_causal else 1)
        found[name] = {"ms": took, "tflops": flops / took / 1e9}
    return found


def table_of(found: dict[str, dict[str, dict[str, float]]]) -> str:
    rows = []
    for name in ROWS:
        row = {"row": name}
        for attention, of in found.items():
            row[attention] = f"{of[name]['ms']:.2f} ms, {of[name]['tflops']:.3g} TFLOP/s"
        rows.append(row)
    return markdown_table(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shorten", type=int, help="samples so many times shorter; default 1 on cuda, 32 on cpu")
    parser.add_argument("--name", help="name of the record under benchmarks/results")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    shorten = arguments.shorten or (1 if device.type == "cuda" else 32)
    found, missing = {}, {}
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(device, Path(scratch), Path(scratch))
        for attention in (name for name in ATTENTION_NAMES if name not in LEFT_OUT):
            if reason := obstacle(attention, device, torch.bfloat16):
                missing[attention] = reason
            else:
                found[attention] = measure(bench, attention, shorten)
    table = table_of(found)
    said = f"One layer, forward and backward, bfloat16 on {device.type}"
    said += f", samples {shorten} times shorter than real ones.\n\n" if shorten > 1 else ".\n\n"
    left = "".join(f"\n- {name}: {reason}" for name, reason in missing.items())
    table += f"\n\nNot run here:\n{left}" if left else ""
    print(said + table)
    payload = {"shorten": shorten, "rows": found, "not_run": missing}
    write_record(arguments.name or f"attention_{device.type}", payload, said + table)


if __name__ == "__main__":
    main()
