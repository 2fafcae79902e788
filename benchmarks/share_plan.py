"""What shared prefixes leave of an epoch's work, for 1 to 256 ranks: planned FLOPs of the longest ranks, no model runs.

    python -m benchmarks.share_plan [--questions 9] [--screens 240] [--ranks 1 8 64 256]

Screenshots and lengths are drawn as in `benchmarks.plan` (GUI grounding, FLOPs of Qwen3-VL-4B's published shape), with
a number of questions about each. An epoch takes the sum, over micro-steps, of the largest rank's FLOPs: under
`data.share_prefix=off`, and under `group` with the same samples in a step and with that many times as many, which keeps
the number of screenshots in a step. Sharing that happens to meet under `step` is not counted. Where a rank has one
sample, what is left of the gain is evenness: questions of one screenshot are of one length.
"""

from __future__ import annotations

import argparse
import dataclasses

import numpy as np

from benchmarks.parts.record import markdown_table, write_record
from benchmarks.plan import PACK_TOKENS, QWEN3_VL_4B, draw
from pixelprune.flops import CostModel
from training.data.balance import PrefixColumns
from training.data.plan import PlanInput, PlanSettings, plan_epoch

PREFIX_TEXT = 15
"""Tokens of the template around a screenshot, up to its end."""


def questions_about(num_screens: int, num_questions: int, cost: CostModel, *, pruned: bool, seed: int = 0) -> PlanInput:
    """Records of `num_questions` about each screenshot: texts differ, what stands before them does not."""
    screens = draw("screens", num_screens, seed)
    blocks = np.repeat(screens.kept if pruned else screens.full, num_questions)
    texts = draw("screens", len(blocks), seed + 1)
    lengths = dataclasses.replace(texts, kept=blocks, full=blocks)
    prefix_cost = cost.batch_flops(
        image_tokens=blocks,
        patch_squares=(4 * blocks) ** 2,
        text_tokens=np.full(len(blocks), PREFIX_TEXT),
        supervised_tokens=np.zeros(len(blocks)),
        training=True,
    )
    group = np.repeat(np.arange(num_screens), num_questions)
    prefixes = PrefixColumns(group, blocks + PREFIX_TEXT, 4 * blocks, prefix_cost)
    return dataclasses.replace(lengths.plan_input(cost), prefixes=prefixes)


def epoch_flops(inputs: PlanInput, samples_per_step: int, world_size: int, max_shared: int) -> float:
    """FLOPs that one rank waits for in an epoch."""
    settings = PlanSettings(samples_per_step, PACK_TOKENS, 4 * PACK_TOKENS, max_shared=max_shared)
    plan = plan_epoch(inputs, settings, epoch=0, world_size=world_size)
    return sum(float(step.cost.max(axis=1).sum()) for step in plan)


def measure(inputs: PlanInput, world_size: int, samples_per_step: int, num_questions: int) -> dict[str, float]:
    """Gains over `off`, whose order is drawn over records, with the same samples per step."""
    apart = epoch_flops(inputs, samples_per_step, world_size, 0)
    many = samples_per_step * num_questions
    return {
        "same_samples": apart / epoch_flops(inputs, samples_per_step, world_size, num_questions),
        "same_screens": epoch_flops(inputs, many, world_size, 0) / epoch_flops(inputs, many, world_size, num_questions),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--screens", type=int, default=240)
    parser.add_argument("--questions", type=int, default=9, help="about each screenshot")
    parser.add_argument("--samples-per-step", type=int, default=64)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 8, 16, 64, 256])
    parser.add_argument("--no-record", action="store_true")
    arguments = parser.parse_args()
    cost = CostModel.from_config(QWEN3_VL_4B)
    rows = [
        {"data": name, "ranks": ranks}
        | measure(
            questions_about(arguments.screens, arguments.questions, cost, pruned=pruned),
            ranks,
            arguments.samples_per_step,
            arguments.questions,
        )
        for name, pruned in (("PixelPrune", True), ("Full", False))
        for ranks in arguments.ranks
    ]
    num, times = arguments.samples_per_step, arguments.questions
    sentence = (
        f"{arguments.screens} screenshots, {times} questions about each, FLOPs of Qwen3-VL-4B's shape, packs of "
        f"{PACK_TOKENS} tokens: an epoch under data.share_prefix=off over the same under group, by the FLOPs of the "
        "longest ranks. On many ranks part of it is evenness: a step of few screenshots has samples of few lengths."
    )
    table = markdown_table(
        [
            {
                "data": row["data"],
                "ranks": row["ranks"],
                f"{num} samples per step": f"{row['same_samples']:.2f}x",
                f"{num * times} samples per step": f"{row['same_screens']:.2f}x",
            }
            for row in rows
        ]
    )
    print(sentence + "\n\n" + table)
    if not arguments.no_record:
        write_record("share_plan", {"settings": vars(arguments), "rows": rows}, sentence + "\n\n" + table)


if __name__ == "__main__":
    main()
