"""Answers of a model, scored: `python -m training.evaluate CHECKPOINT --data EVAL.jsonl --mode both`.

One process, or all ranks under `torchrun --module` or `deepspeed --module`. Every prediction is written as it is made;
the same command continues a pass that was stopped, also on another number of ranks.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from pixelprune.answers import FORMATS
from pixelprune.command import CommandParser, plain_console
from pixelprune.records.presets import PRESETS
from pixelprune.selection.selection import BUDGETS, DIRECTIONS
from pixelprune.settings import ResizeSettings
from training.command import run_command, set_up_logging
from training.config.settings import ATTENTION_NAMES
from training.distributed.ranks import join_ranks, leave_ranks
from training.evaluation.answering import AnswerSettings
from training.evaluation.inputs import default_out, model_of
from training.evaluation.passes import MODES, evaluate, result_table
from training.evaluation.results_page import PAGE_FILE
from training.exit_codes import leave_process
from training.model.loading import DTYPES


def main(argv: list[str] | None = None) -> int:
    """The command line. User errors end with one line and exit code 2."""
    args = parser().parse_args(argv)
    return run_command(lambda: _evaluate(args))


def _evaluate(args: argparse.Namespace) -> None:
    console = plain_console(stderr=True)
    args.checkpoint = model_of(args.checkpoint)
    ranks = join_ranks()
    try:
        results = evaluate(args, ranks, console)
        if ranks.is_first:
            for mode, result in results.items():
                plain_console(width=max(console.width, 110)).print(result_table(mode, result))
            out = args.out or default_out(args.checkpoint)
            out = out.relative_to(Path.cwd()) if out.is_relative_to(Path.cwd()) else out
            page = f"{PAGE_FILE}; " if args.page else ""
            what = f"{page}predictions, figures and a sheet in {' and '.join(results)}"
            plain_console().print(f"results: {out} ({what})", soft_wrap=True)
    finally:
        leave_ranks()


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text!r}: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text!r}")
    return value


def parser() -> argparse.ArgumentParser:
    """Its arguments, which `training.tables` fills in for every cell."""
    resize = ResizeSettings()
    parser = CommandParser(
        example="python -m training.evaluate runs/tutorial/pruned --data data_tools/samples/eval.jsonl --limit 40",
        prog="training.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "checkpoint",
        help="model folder, or a run, whose export is taken; a checkpoint is exported first (training.export)",
    )
    add("--data", nargs="+", required=True, help="records whose metadata has a box or a scorer; see docs/grounding.md")
    add(
        "--ignore-keys",
        nargs="+",
        default=[],
        metavar="KEY",
        help="keys of records that say nothing, as data.ignore_keys",
    )
    add("--mode", choices=(*MODES, "both"), default="both", help="all tokens, pruned, or one after the other")
    add("--out", type=Path, help="folder of the results; CHECKPOINT-evaluation by default, evaluation/ID for a hub id")
    add("--batch-size", type=int, default=8, help="conversations generated together on a rank (default 8)")
    add("--max-new-tokens", type=int, default=128)
    add("--prompt", default="as_recorded", choices=tuple(PRESETS), help="what is written around every question")
    add("--system", default="", help="a system prompt instead of the preset's")
    add("--template", default="", help="a template instead of the preset's, {question} where the record's text belongs")
    add("--answer-format", choices=FORMATS, default="auto", help="how coordinates are read, and written for `objects`")
    what = "as in training with data.grounding_tokens, which an export says itself"
    add("--grounding-tokens", action="store_true", help=what)
    what = 'for the chat template; by default {"enable_thinking": false}'
    add("--template-kwargs", type=_json_object, default=AnswerSettings().template_kwargs, metavar="JSON", help=what)
    add("--limit", type=int, default=0, help="only the first n records; 0 takes all")
    what = "records shown in results.html, misses first; 0 writes none (default 100)"
    add("--page", type=int, default=100, metavar="N", help=what)
    add("--retry-failed", action="store_true", help="answer records again whose generation failed")
    add("--strategy", help="mode pruned: another strategy than the model's, such as random, conncomp or resize")
    add("--metric", help="mode pruned: max or mae")
    add("--threshold", type=float, help="mode pruned: distance at which a block is omitted")
    add("--seed", type=int, help="mode pruned: seed of the random baselines")
    add("--direction", choices=DIRECTIONS, help="mode pruned: of pred3d (docs/sessions.md); auto is backward here")
    what = "mode pruned: of pred3d forward, whether a block that replaced another is kept"
    add("--keep-replaced", action=argparse.BooleanOptionalAction, help=what)
    add("--budget", choices=BUDGETS, help="mode pruned: of a baseline, as many blocks of an image as this one keeps")
    add(
        "--depth",
        type=int,
        metavar="K",
        help="mode pruned: drop blocks behind this layer of the vision tower",
    )
    add("--min-pixels", type=int, help=f"after resizing; the model's, else {resize.min_pixels}")
    add("--max-pixels", type=int, help=f"after resizing; the model's, else {resize.max_pixels}")
    add("--dtype", choices=tuple(DTYPES), help="bfloat16 on an accelerator, float32 elsewhere")
    add("--attention", default="auto", choices=ATTENTION_NAMES, help="auto takes the fastest that runs here")
    add("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # given by the deepspeed launcher
    return parser


if __name__ == "__main__":
    set_up_logging()
    leave_process(main())
