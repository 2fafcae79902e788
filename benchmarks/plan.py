"""How full and how even the plan's packs are, and how long planning takes, next to what peers do.

    python -m benchmarks.plan [--records 1000000] [--ranks 8 64 256 1024]

Waste = 1 - sum of FLOPs / (ranks x sum over micro-steps of the largest rank's FLOPs): the share of the fleet's time
spent waiting for the slowest rank. Its bound is the waste that no plan of the same optimizer steps can go below, since
a sample cannot be split. The peer is next-fit in arrival order by *unpruned* length, packs assigned in turn: what
packing before pruning amounts to. Both plan the same samples; the peer has to drop those whose unpruned length exceeds
the cap, and the table says how many. FLOPs are those of Qwen3-VL-4B's published shape.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

import numpy as np

from benchmarks.parts.record import markdown_table, write_record
from pixelprune.flops import CostModel
from pixelprune.settings import BLOCK
from training.data.balance import waste_bound
from training.data.plan import PlanInput, PlanSettings, plan_epoch

QWEN3_VL_4B = {
    "model_type": "qwen3_vl",
    "text_config": {
        "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
    },
    "vision_config": {
        "depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16, "out_hidden_size": 2560,
        "patch_size": 16, "temporal_patch_size": 2, "spatial_merge_size": 2, "in_channels": 3,
        "deepstack_visual_indexes": [5, 11, 17],
    },
}  # fmt: skip
SAMPLES_PER_RANK = 16
PACK_TOKENS = 16384
SCREENS = [(1280, 720), (1366, 768), (1920, 1080), (2560, 1440), (3840, 2160), (1170, 2532), (2048, 2732)]
SCREEN_SHARES = [0.08, 0.1, 0.4, 0.17, 0.1, 0.1, 0.05]
PAGES = [(1654, 2339), (1240, 1754), (2480, 3508), (1700, 2200)]
PAGE_SHARES = [0.4, 0.3, 0.1, 0.2]


@dataclass(frozen=True)
class Lengths:
    """What an index would hold for n records of one image each (0 blocks: text only)."""

    kept: np.ndarray
    full: np.ndarray
    text: np.ndarray
    supervised: np.ndarray

    def plan_input(self, cost: CostModel) -> PlanInput:
        flops = cost.batch_flops(
            image_tokens=self.kept,
            patch_squares=(4 * self.kept) ** 2,
            text_tokens=self.text,
            supervised_tokens=self.supervised,
            training=True,
        )
        ones = np.ones(len(self.kept))
        return PlanInput(
            self.text + self.kept,
            4 * self.kept,
            flops,
            self.supervised,
            self.supervised.astype(float),
            ones,
            np.zeros(len(ones), dtype=np.int64),
        )


def draw(kind: str, num: int, seed: int = 0) -> Lengths:
    """Lengths whose resolutions and retain ratios are spread as the paper reports them for this kind of data.

    screens: GUI grounding (ScreenSpot-like), dataset retain ratio about 0.35, short questions and answers.
    documents: pages, about 0.5, longer answers. mixed: 60 % screens, 25 % documents, 15 % text only.
    """
    rng = np.random.default_rng(seed)
    if kind == "mixed":
        parts = [draw("screens", num * 60 // 100, seed + 1), draw("documents", num * 25 // 100, seed + 2)]
        rest = num - sum(len(part.kept) for part in parts)
        text = np.minimum(np.exp(rng.normal(6.0, 1.0, rest)).astype(np.int64) + 20, 8000)
        none = np.zeros(rest, dtype=np.int64)
        parts.append(Lengths(none, none, text, text // 2))
        order = rng.permutation(num)
        return Lengths(*(np.concatenate([getattr(p, name) for p in parts])[order] for name in Lengths.__annotations__))
    sizes, shares, mean_ratio = (
        (SCREENS, SCREEN_SHARES, 0.35) if kind == "screens" else (PAGES, PAGE_SHARES, 0.5)
    )  # fmt: skip
    chosen = np.array(sizes)[rng.choice(len(sizes), num, p=shares)]
    full = np.round(chosen / BLOCK).astype(np.int64).prod(axis=1)
    ratio = rng.beta(3 * mean_ratio / (1 - mean_ratio), 3, num)
    kept = np.maximum((full * ratio).astype(np.int64), 1)
    text = rng.integers(30, 120, num) if kind == "screens" else np.exp(rng.normal(5.5, 0.8, num)).astype(np.int64) + 30
    return Lengths(kept, full, np.minimum(text, 8000), np.maximum(text // 4, 1))


def measure(kind: str, num: int, ranks: int, cost: CostModel) -> dict:
    """One row: this plan and the peer's on the same records."""
    lengths = draw(kind, num)
    inputs = lengths.plan_input(cost)
    settings = PlanSettings(SAMPLES_PER_RANK * ranks, PACK_TOKENS, 4 * PACK_TOKENS)
    plan_epoch(inputs, settings, epoch=0, world_size=ranks)[0]  # compiles
    start = time.process_time()
    plan = plan_epoch(inputs, settings, epoch=0, world_size=ranks)
    steps = list(plan)
    seconds = time.process_time() - start
    spent = sum(float(step.cost.max(axis=1).sum()) for step in steps) * ranks
    bound = sum(waste_bound(inputs.cost[step.rows], ranks) for step in steps) * ranks
    total = float(inputs.cost.sum())
    num_packs = sum(int((step.cost > 0).sum()) for step in steps)
    peer = next_fit_by_full_length(lengths, inputs, plan.order, ranks)
    return {
        "data": kind,
        "ranks": ranks,
        "retain_ratio": float(lengths.kept.sum() / lengths.full.sum()),
        "samples_per_step": settings.samples_per_step,
        "micro_steps_per_step": sum(step.num_micro_steps for step in steps) / len(steps),
        "waste": 1 - total / spent,
        "waste_bound": 1 - total / bound,
        "pack_fill": float(inputs.tokens.sum()) / (num_packs * PACK_TOKENS),
        "seconds_per_million": seconds * 1e6 / num,
        **peer,
    }


def next_fit_by_full_length(lengths: Lengths, inputs: PlanInput, order: np.ndarray, ranks: int) -> dict:
    """Packs closed when the next sample's unpruned length does not fit; R packs in a row make a micro-step."""
    full = (lengths.text + lengths.full)[order]
    fits = full <= PACK_TOKENS
    rows = order[fits]
    pack_of = np.empty(len(rows), dtype=np.int64)
    pack, used = 0, 0
    for i, length in enumerate(full[fits].tolist()):
        if used + length > PACK_TOKENS:
            pack, used = pack + 1, 0
        pack_of[i] = pack
        used += length
    num_micro = -(-(pack + 1) // ranks)
    loads = np.bincount(pack_of, weights=inputs.cost[rows], minlength=num_micro * ranks).reshape(num_micro, ranks)
    return {
        "peer_waste": 1 - float(loads.sum() / (ranks * loads.max(axis=1).sum())),
        "peer_pack_fill": float(inputs.tokens[rows].sum()) / ((pack + 1) * PACK_TOKENS),
        "peer_dropped": float(1 - fits.mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 256, 1024])
    arguments = parser.parse_args()
    cost = CostModel.from_config(QWEN3_VL_4B)
    rows = []
    for kind in ("screens", "documents", "mixed"):
        for ranks in arguments.ranks:
            rows.append(measure(kind, arguments.records, ranks, cost))
            print(rows[-1], flush=True)
    table = markdown_table(
        [
            {
                "data": row["data"],
                "ranks": row["ranks"],
                "micro-steps": f"{row['micro_steps_per_step']:.2f}",
                "waste": f"{100 * row['waste']:.2f} %",
                "bound": f"{100 * row['waste_bound']:.2f} %",
                "peer waste": f"{100 * row['peer_waste']:.1f} %",
                "fill": f"{100 * row['pack_fill']:.0f} %",
                "peer fill": f"{100 * row['peer_pack_fill']:.0f} %",
                "peer drops": f"{100 * row['peer_dropped']:.1f} %",
                "s / million": f"{row['seconds_per_million']:.1f}",
            }
            for row in rows
        ]
    )
    note = (
        f"{arguments.records:,} records, {SAMPLES_PER_RANK} samples per rank and optimizer step, packs of "
        f"{PACK_TOKENS} tokens. The peer packs next-fit in arrival order by unpruned length. Planning time is "
        "processor time. A step takes whole micro-steps, so the fill follows from samples per step and cap."
    )
    payload = {"num_records": arguments.records, "samples_per_rank": SAMPLES_PER_RANK, "pack_tokens": PACK_TOKENS}
    write_record("plan", {**payload, "rows": rows}, f"{note}\n\n{table}")
    print(table)


if __name__ == "__main__":
    main()
