"""Passes over held-out records, one per mode: answered on all ranks, scored, written down as they are made."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from pixelprune.command import ProgressLine
from pixelprune.files import write_whole
from pixelprune.prompter import Prompter
from pixelprune.records.objects import ObjectStyle
from pixelprune.selection import check_settings
from pixelprune.selection.baselines import AT_BUDGET
from pixelprune.selection.registry import get_strategy, is_in_time
from pixelprune.settings import PruneSettings
from training.data.settings import SourceSettings
from training.distributed.ranks import PATIENCE_MINUTES, Ranks
from training.errors import UserError
from training.evaluation.answering import AnswerSettings, Task, predict, read_tasks
from training.evaluation.inputs import default_out, model_fingerprint, name_sources
from training.evaluation.prediction_files import PredictionFiles
from training.evaluation.prediction_sheet import draw_sheet
from training.evaluation.results_page import PAGE_FILE, ShownPass, write_results_page
from training.evaluation.scoring import summarise
from training.evaluation.table_files import cells_of
from training.model.attention import choose_attention, load_pretrained
from training.model.loading import DTYPES

logger = logging.getLogger(__name__)

MODES = ("full", "pruned")


def evaluate(
    args: argparse.Namespace,
    ranks: Ranks,
    console: Console,
    *,
    load: Callable[..., Any] | None = None,
    show: Callable[[ShownPass], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Every mode asked for: mode -> result, as in result.json; results.html shows them together.

    load: instead of `load_checkpoint`, for a caller that has the model already. show: takes every pass on the first
    rank, for a caller with a page of its own; none is written then.
    Raises UserError for data, checkpoint or settings that cannot be used, the same one on every rank.
    """
    modes = MODES if args.mode == "both" else (args.mode,)
    prompters = ranks.agree(lambda: {mode: _prompter(args, mode) for mode in modes})
    tasks, refused = ranks.agree(lambda: _read_data(args, prompters[modes[0]].grounding_tokens))
    model = ranks.agree(lambda: (load or load_checkpoint)(args, ranks.device))
    answers = AnswerSettings(args.max_new_tokens, args.answer_format, args.batch_size, args.template_kwargs, args.depth)
    ranks.agree(lambda: _check_depth(args, model))
    out = args.out or default_out(args.checkpoint)
    results = {}
    shown: list[ShownPass] = []
    for mode, prompter in prompters.items():
        answers = dataclasses.replace(answers, depth=args.depth if mode == "pruned" else None)
        settings = {
            "checkpoint": args.checkpoint,
            "weights": ranks.from_first(partial(model_fingerprint, args.checkpoint, model.config)),
            "data": [str(Path(path).resolve()) if Path(path).exists() else path for path in args.data],
            "prompt": {"name": args.prompt, **vars(_sources(args)[0].preset())},
            "prune": dataclasses.asdict(prompter.prune),
            "resize": dataclasses.asdict(prompter.resize),
            "max_new_tokens": answers.max_new_tokens,
            "answer_format": answers.answer_format,
            "template_kwargs": answers.template_kwargs,
            "depth": answers.depth,
            "dtype": str(model.dtype).removeprefix("torch."),
        }
        files = PredictionFiles(out / mode, settings)
        _run_pass(model, prompter, tasks, answers, files, ranks, console, retry_failed=args.retry_failed)
        write = partial(_write_result, files, tasks, refused, prompter, show or shown.append)
        results[mode] = ranks.from_first(write)
    if show is None and args.page:
        title = f"Evaluation of {args.checkpoint}"
        ranks.from_first(lambda: write_results_page(out / PAGE_FILE, title, shown, args.page))
    return results


def _check_depth(args: argparse.Namespace, model: Any) -> None:
    if args.depth is None:
        return
    num_layers = len(model.model.visual.blocks)
    if not -1 <= args.depth < num_layers:
        raise UserError(f"--depth: expected a layer from -1 (before the first) to {num_layers - 1}, got {args.depth}")
    if args.strategy == "resize":
        raise UserError("--depth: strategy 'resize' scales the image, there are no blocks to drop in the tower")


def _read_data(args: argparse.Namespace, grounding_tokens: bool) -> tuple[list[Task], dict[str, str]]:
    tasks, refused = read_tasks(
        _sources(args),
        ignore_keys=args.ignore_keys,
        object_style=ObjectStyle(args.answer_format, grounding_tokens),
    )
    if not tasks:
        reason = next(iter(refused.values()), "no records")
        raise UserError(f"--data: no record can be evaluated; the first of {len(refused)}: {reason}")
    return tasks[: args.limit or None], refused


def _sources(args: argparse.Namespace) -> list[SourceSettings]:
    return name_sources(args.data, prompt=args.prompt, system=args.system, template=args.template)


def _run_pass(
    model: Any,
    prompter: Prompter,
    tasks: list[Task],
    answers: AnswerSettings,
    files: PredictionFiles,
    ranks: Ranks,
    console: Console,
    *,
    retry_failed: bool,
) -> None:
    """Answer what is not answered yet, this rank's share of it."""
    ranks.from_first(lambda: files.start(retry_failed=retry_failed))
    done = files.done({task.id: task.fingerprint for task in tasks})
    pending = [task for task in tasks if task.id not in done]
    ranks.barrier()  # all have read what is done before anyone adds to it
    if done and pending and ranks.is_first:
        console.print(f"{files.folder}: continuing, {len(tasks) - len(pending)} of {len(tasks)} are answered")
    mine = pending[ranks.rank :: ranks.world_size]
    what = f"{files.folder.name}, on this rank" if ranks.world_size > 1 else files.folder.name
    with ProgressLine(what, len(mine), is_shown=ranks.is_first, console=console) as line:
        num_scored, total = 0, 0.0
        for predictions in predict(model, prompter, mine, answers):
            files.append(ranks.rank, predictions)
            scores = [prediction.score for prediction in predictions if prediction.score is not None]
            num_scored, total = num_scored + len(scores), total + sum(scores)
            status = f"accuracy so far {total / num_scored:.1%}" if num_scored else ""
            line.update(line.num_done + len(predictions), status)
    ranks.barrier(PATIENCE_MINUTES)


def _write_result(
    files: PredictionFiles,
    tasks: list[Task],
    refused: dict[str, str],
    prompter: Prompter,
    show: Callable[[ShownPass], None],
) -> dict[str, Any]:
    predictions = files.merge({task.id: task.fingerprint for task in tasks})
    result = {**files.settings, **summarise(predictions), "num_refused": len(refused), "refused": refused}
    write_whole(files.folder / "result.json", (json.dumps(result, indent=2) + "\n").encode())
    draw_sheet(list(zip(tasks, predictions, strict=True)), files.folder / "sheet.png", prompter.resize)
    cells = cells_of(result, Path(files.settings["data"][0]).stem)
    show(ShownPass(files.folder.name, prompter, tasks, predictions, cells))
    return result


def result_table(mode: str, result: dict[str, Any]) -> Table:
    """One line per group: accuracy, failures, retain ratio, speed."""
    prune = result["prune"]
    strategy = prune["strategy"] if prune["strategy"] == "none" else f"{prune['strategy']}, {prune['threshold']:g}"
    table = Table(title=f"{mode} ({strategy})", title_justify="left")
    for head in ("", "records", "accuracy", "macro", "not parsed", "failed", "retain", "tokens", "first token s"):
        table.add_column(head, justify="left" if not head else "right")
    has_subsets = set(result["subset"]) != set(result["benchmark"])  # a benchmark without any is its own
    for group in ("overall", "benchmark", *(("subset",) if has_subsets else ()), "element"):
        for name, score in result[group].items():
            table.add_row(
                name,
                str(score["num"]),
                _shown(score["accuracy"], "{:.2%}"),
                _shown(score.get("macro"), "{:.2%}"),
                str(score["num_unparsed"]),
                str(score["num_failed"]),
                _shown(score["retain_ratio"], "{:.2%}"),
                _shown(score["tokens_per_answer"], "{:.1f}"),
                _shown(score["first_token_s"], "{:.3f}"),
            )
        table.add_section()
    if result["num_refused"]:
        table.caption = f"{result['num_refused']} records cannot be evaluated: see result.json"
    return table


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _prompter(args: argparse.Namespace, mode: str) -> Prompter:
    """Prompts of a mode: all blocks, or pruned as the model was trained unless the command line says otherwise."""
    try:
        prompter = Prompter.load(str(args.checkpoint), grounding_tokens=args.grounding_tokens or None)
    except ValueError as error:
        raise UserError(str(error)) from error
    limits = {"min_pixels": args.min_pixels, "max_pixels": args.max_pixels}
    resize = dataclasses.replace(prompter.resize, **{name: value for name, value in limits.items() if value})
    if mode == "full":
        return dataclasses.replace(prompter, prune=PruneSettings("none"), resize=resize)
    trained = prompter.prune if prompter.prune.strategy != "none" else PruneSettings()
    names = [field.name for field in dataclasses.fields(PruneSettings)]
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    prune = dataclasses.replace(trained, **given)
    try:
        check_settings(prune)
        get_strategy(prune.strategy)
        _check_read(prune, given)
    except ValueError as error:
        raise UserError(str(error)) from error
    return dataclasses.replace(prompter, prune=prune, resize=resize)


def _check_read(prune: PruneSettings, given: dict[str, Any]) -> None:
    """Raises ValueError for an option of sessions or budgets that the strategy would not look at."""
    in_time = is_in_time(prune)
    is_forward = in_time and prune.resolved(last_turn_only=True).direction == "forward"
    if "budget" in given and prune.strategy not in AT_BUDGET:
        raise ValueError(f"--budget: belongs to --strategy {', '.join(sorted(AT_BUDGET))}, got {prune.strategy}")
    if "direction" in given and not in_time:
        raise ValueError(f"--direction: belongs to --strategy pred3d, or --budget pred3d, got {prune.strategy}")
    if "keep_replaced" in given and not is_forward:
        raise ValueError("--keep-replaced: belongs to pred3d with --direction forward")


def load_checkpoint(args: argparse.Namespace, device: torch.device) -> Any:
    """The checkpoint that is asked, in eval mode on the device. Raises UserError where it is no model folder."""
    name = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    attention = choose_attention(args.attention, device, DTYPES[name])
    try:
        model = load_pretrained(str(args.checkpoint), attention=attention, dtype=DTYPES[name])
    except (OSError, ValueError) as error:
        raise UserError(f"{args.checkpoint} is not a loadable model folder: {str(error).splitlines()[0]}") from error
    return model.to(device).eval()
