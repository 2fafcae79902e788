"""What pruning does to images, a model in the terminal, and parity with vLLM: `python -m pixelprune COMMAND`.

`stats PATH...`, `show IMAGE... -o OUT.png`, `chat FOLDER IMAGE...`, `parity FOLDER IMAGE...`.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from rich.table import Table

from pixelprune.command import USER_ERROR, CommandParser, ProgressLine, plain_console, run_command
from pixelprune.images.image import PrunedImage, decode_image, resize_image
from pixelprune.selection import METRICS, check_settings
from pixelprune.selection.overlay import draw_overlay, side_by_side
from pixelprune.selection.registry import is_in_time, strategy_names
from pixelprune.selection.selection import DIRECTIONS
from pixelprune.selection.stats import DatasetStats, ImageStats, find_images, measure_files
from pixelprune.sessions.conversations import (
    find_conversations,
    measure_conversations,
    num_conversations,
    read_conversation,
)
from pixelprune.sessions.pruning import Shot, prune_shots
from pixelprune.settings import BLOCK, PruneSettings, ResizeSettings
from pixelprune.vllm.parity import TOLERANCE, run_parity


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 2 wrong usage, or nothing that could be measured."""
    options = _parser().parse_args(arguments)
    return run_command(lambda: options.run(options))  # ValueErrors, ImageError among them, and files are the user's


def _parser() -> argparse.ArgumentParser:
    resize, names = ResizeSettings(), strategy_names()
    shared = CommandParser(add_help=False)
    shared.add_argument("--strategies", nargs="+", choices=names, default=None, metavar="NAME", help=", ".join(names))
    shared.add_argument("--metric", choices=METRICS, default="max")
    shared.add_argument(
        "--thresholds", nargs="+", type=float, default=[0.0], metavar="T", help="0..1, default 0 (exact)"
    )
    shared.add_argument(
        "--directions",
        nargs="+",
        choices=DIRECTIONS[1:],
        default=None,
        metavar="D",
        help="of pred3d, over the images of a folder in the order of their names, of the command line, or of a "
        "conversation: backward (default), forward",
    )
    shared.add_argument("--root", type=Path, help="of the images of a JSONL file, default its folder")
    shared.add_argument("--min-pixels", type=int, default=resize.min_pixels, help=f"default {resize.min_pixels}")
    shared.add_argument("--max-pixels", type=int, default=resize.max_pixels, help=f"default {resize.max_pixels}")
    stats_example = "python -m pixelprune stats data_tools/samples/images"
    parser = CommandParser(example=stats_example, prog="python -m pixelprune", description=__doc__)
    commands = parser.add_subparsers(required=True)

    stats = commands.add_parser(
        "stats", parents=[shared], help="redundancy of images, files or folders", example=stats_example
    )
    stats.add_argument(
        "paths",
        nargs="+",
        type=Path,
        metavar="PATH",
        help="image, folder of PNG, JPEG and WebP files, or JSONL file of conversations",
    )
    stats.add_argument("--json", action="store_true", help="all numbers as JSON on standard output")
    stats.add_argument("--extremes", type=int, default=3, metavar="N", help="best and worst images to list, default 3")
    stats.add_argument("--threads", type=int, default=min(8, os.cpu_count() or 1))
    stats.set_defaults(run=_stats)

    show = commands.add_parser(
        "show",
        parents=[shared],
        help="draw which blocks are omitted",
        example="python -m pixelprune show data_tools/samples/images/settings-1366x768-dark.png "
        "-o runs/tutorial/settings.png",
    )
    what = "several: a session, in the order of time; or one JSONL file of conversations"
    show.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help=what)
    show.add_argument("--line", type=int, default=1, help="of the JSONL file, default 1: whose images are drawn")
    show.add_argument("-o", "--output", type=Path, required=True, metavar="OUT.png")
    show.add_argument("--panel-width", type=int, default=1280, help="pixels at most, default 1280")
    show.set_defaults(run=_show)

    chat = commands.add_parser(
        "chat",
        help="talk with a model, with images and what is kept of them",
        example="python -m pixelprune chat runs/tutorial/model data_tools/samples/images/settings-1366x768-dark.png",
    )
    chat.add_argument("folder", help="model folder, run's folder or hub id")
    chat.add_argument("images", nargs="*", type=Path, metavar="IMAGE", help="shown with the first question")
    chat.add_argument("--strategy", choices=names, help='instead of the trained one; "none" keeps all tokens')
    chat.add_argument("--max-new-tokens", type=int, metavar="N", help="of an answer")
    chat.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    chat.set_defaults(run=_chat)

    parity = commands.add_parser(
        "parity",
        help="Hugging Face and vLLM answers of a checkpoint side by side",
        example="python -m pixelprune parity runs/tutorial/model data_tools/samples/images/settings-1366x768-dark.png",
    )
    parity.add_argument("folder", help="model folder or hub id, as it is deployed")
    parity.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    parity.add_argument("--question", default="Describe the image.", help='default "Describe the image."')
    parity.add_argument("--max-tokens", type=int, default=16, metavar="N", help="default 16")
    parity.add_argument("--dtype", default="auto", help="of both models, default that of the checkpoint")
    parity.add_argument("--engine", default="{}", metavar="JSON", help="arguments of vllm.LLM, those of the deployment")
    parity.add_argument("--tolerance", type=float, default=TOLERANCE, help=f"of log-probabilities, default {TOLERANCE}")
    parity.set_defaults(run=_parity)
    return parser


def _chat(options: argparse.Namespace) -> None:
    for image in options.images:
        if not image.is_file():
            raise ValueError(f"there is no image {image} here")
    from pixelprune.command.terminal_chat import chat  # the other commands do without transformers

    chat(
        options.folder,
        options.images,
        strategy=options.strategy,
        max_new_tokens=options.max_new_tokens,
        trust_remote_code=options.trust_remote_code,
    )


def _parity(options: argparse.Namespace) -> int:
    return run_parity(
        options.folder,
        options.images,
        question=options.question,
        max_tokens=options.max_tokens,
        dtype=options.dtype,
        engine=options.engine,
        tolerance=options.tolerance,
    )


def _rules(options: argparse.Namespace, default: tuple[str, ...]) -> dict[str, PruneSettings]:
    """Every strategy at every threshold, labelled by strategy, with the threshold where it says something."""
    rules: dict[str, PruneSettings] = {}
    for strategy, threshold in itertools.product(options.strategies or default, options.thresholds):
        rule = PruneSettings(strategy=strategy, metric=options.metric, threshold=threshold)
        check_settings(rule)
        label = strategy if threshold == 0 else f"{strategy} {options.metric} <= {threshold:g}"
        if not is_in_time(rule):
            rules[label] = rule
            continue
        for direction in options.directions or ("backward",):
            along = label.replace(strategy, f"{strategy} {direction}", 1) if options.directions else label
            rules[along] = dataclasses.replace(rule, direction=direction)
    if options.directions and not any(map(is_in_time, rules.values())):
        raise ValueError(f"--directions: belongs to --strategies pred3d, got {', '.join(rules)}")
    return rules


def _resize(options: argparse.Namespace) -> ResizeSettings:
    return ResizeSettings(min_pixels=options.min_pixels, max_pixels=options.max_pixels)


def _stats(options: argparse.Namespace) -> int:
    rules = _rules(options, default=("pred2d", "raster", "serpentine"))
    files, others = find_conversations(options.paths)
    paths, unreadable = find_images(others)
    if not files and not paths and not unreadable:
        raise ValueError(f"no PNG, JPEG or WebP image below {', '.join(map(str, options.paths))}")
    _check_root(options, files)
    if options.threads < 1:
        raise ValueError(f"--threads: expected at least 1, got {options.threads}")
    result = DatasetStats(unreadable=unreadable)
    how = rules, _resize(options), options.threads
    by_record = (measure_conversations(file, *how, options.root or file.parent) for file in files)
    by_file = ([outcome] for outcome in measure_files(paths, *how))
    with ProgressLine("measuring", len(paths) + sum(map(num_conversations, files))) as progress:
        for outcomes in itertools.chain(by_file, *by_record):
            for outcome in outcomes:
                if isinstance(outcome, ImageStats):
                    result.images.append(outcome)
                else:
                    result.unreadable.append(outcome)
            progress.advance()
    if options.json:
        print(json.dumps(result.as_dict(), indent=2))
    else:
        _print_stats(result, list(rules), options.extremes)
    return 0 if result.images else USER_ERROR


def _print_stats(result: DatasetStats, labels: list[str], num_extremes: int) -> None:
    console = plain_console()
    if result.images:
        stored, seen = result.mean_size(original=True), result.mean_size()
        console.print(
            f"{len(result.images)} images, {result.num_blocks} blocks; mean size {stored[1]:.0f} x {stored[0]:.0f} "
            f"as stored, {seen[1]:.0f} x {seen[0]:.0f} as the model sees them; {result.duplicate_ratio:.1%} of the "
            "blocks equal another block of their image",
            soft_wrap=True,
        )
        table = Table("strategy", "retain ratio", "kept blocks")
        for label in labels:
            kept = sum(image.kept[label] for image in result.images)
            table.add_row(label, f"{result.retain_ratio(label):.2%}", str(kept))
        console.print(table)
        ordered = result.by_retain_ratio(labels[0])
        count = min(num_extremes, len(ordered) // 2)
        table = Table(f"retain ratio ({labels[0]})", "duplicate blocks")
        table.add_column("image", overflow="fold")
        for image in [*ordered[:count], *ordered[len(ordered) - count :]] if count else ordered:
            table.add_row(f"{image.retain_ratio(labels[0]):.2%}", f"{image.duplicate_ratio:.1%}", image.path)
        console.print(table)
    if result.unreadable:
        console.print(f"{len(result.unreadable)} could not be read:")
        for _, reason in result.unreadable:
            console.print(f"  {reason}", soft_wrap=True)


def _show(options: argparse.Namespace) -> int:
    rules = _rules(options, default=("pred2d",))
    if options.panel_width < 64:
        raise ValueError(f"--panel-width: expected at least 64 pixels, got {options.panel_width}")
    resize = _resize(options)
    names, shots = _shown(options)
    images = [resize_image(decode_image(shot.source, resize), resize, shot.wish) for shot in shots]
    panels = []
    for label, rule in rules.items():
        for title, image, (pruned, _) in zip(names, images, prune_shots(shots, rule, resize), strict=True):
            kept, total = pruned.selection.num_kept, pruned.num_full_blocks
            name = f"{title}, {label}" if len(images) > 1 else label
            panels.append((f"{name}: keeps {kept} of {total} blocks ({kept / total:.1%})", _panel(image, pruned)))
    # Of a session, a row for every way to see it.
    sheet = side_by_side(panels, options.panel_width, len(images) if 1 < len(images) <= 6 else None)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(options.output, format="PNG")
    plain_console().print(f"wrote {options.output} ({sheet.width} x {sheet.height})", soft_wrap=True)
    return 0


def _shown(options: argparse.Namespace) -> tuple[list[str], list[Shot]]:
    """Names and images of what is drawn: the files named, or a record's."""
    files, others = find_conversations(options.images)
    _check_root(options, files)
    if not files:
        return [path.name for path in others], [Shot(path) for path in others]
    if others or len(files) > 1:
        raise ValueError(f"show: expected images, or one JSONL file, got {', '.join(map(str, options.images))}")
    conversation = read_conversation(files[0], options.line, options.root or files[0].parent)
    if not conversation.shots:
        raise ValueError(f"{files[0]}, line {options.line}: the record has no image")
    return [Path(name).name for name in conversation.names], list(conversation.shots)


def _check_root(options: argparse.Namespace, files: list[Path]) -> None:
    if options.root is not None and not files:
        raise ValueError("--root: belongs to JSONL files of conversations, and none is named")


def _panel(image: np.ndarray, pruned: PrunedImage) -> np.ndarray:
    """uint8, the shape of `image`: omitted blocks under a veil, or what "resize" leaves, enlarged again."""
    if not pruned.unscaled_blocks:
        return draw_overlay(image, pruned.selection)
    rows, cols = pruned.selection.keep.shape
    grid = pruned.blocks.reshape(rows, cols, BLOCK, BLOCK, 3)
    scaled = Image.fromarray(grid.swapaxes(1, 2).reshape(rows * BLOCK, cols * BLOCK, 3))
    return np.asarray(scaled.resize((image.shape[1], image.shape[0])))


if __name__ == "__main__":
    sys.exit(main())
