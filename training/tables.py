"""The paper's tables: `python -m training.tables documents --model MODEL --data docvqa.jsonl infovqa.jsonl`.

A grid of cells, one row on one data file each, in a resumable folder of its own; the same command goes on where it was
stopped, also on another number of ranks, and tables of one --out share the cells that they have in common.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import xxhash

from pixelprune.command import CommandParser, plain_console
from pixelprune.records.presets import PRESETS
from pixelprune.settings import ResizeSettings
from training import evaluate as evaluate_command
from training.command import run_command, set_up_logging
from training.distributed.ranks import Ranks, join_ranks, leave_ranks
from training.errors import UserError
from training.evaluation.answering import Task
from training.evaluation.passes import evaluate, load_checkpoint
from training.evaluation.redundancy import REDUNDANCY, measure_file, write_redundancy_table
from training.evaluation.results_page import ShownPass, write_results_page
from training.evaluation.table_files import Cell, cells_of, write_table
from training.evaluation.table_plans import TABLES, Row, depth_rows
from training.exit_codes import leave_process


def main(argv: list[str] | None = None) -> int:
    """The command line. User errors end with one line and exit code 2."""
    args, more = _parser().parse_known_args(argv)
    return run_command(lambda: _run(args, more))


def _run(args: argparse.Namespace, more: list[str]) -> None:
    ranks = join_ranks()
    try:
        make_table(args, more, ranks)
    finally:
        leave_ranks()


def make_table(args: argparse.Namespace, more: list[str], ranks: Ranks) -> dict[str, dict[str, Cell]]:
    """Every cell, then the table: row label -> benchmark -> cell. more: arguments of `training.evaluate` for all cells.

    Raises UserError for models, rows or data that cannot be used.
    """
    if args.name == REDUNDANCY:
        make_redundancy_table(args, more, ranks)
        return {}
    plan = TABLES[args.name]
    if (args.name == "depth") != bool(args.depths):
        raise UserError("--depths: layers of the vision tower, given for the table 'depth' and for no other")
    plan = dataclasses.replace(plan, rows=plan.rows + depth_rows(args.depths))
    models = _models(args.model, plan.roles)
    rows = [row for row in plan.rows if not args.only or row.label in args.only]
    unknown = sorted(set(args.only) - {row.label for row in plan.rows})
    if unknown:
        raise UserError(f"--only: expected rows of {[row.label for row in plan.rows]}, got {unknown}")
    console, load = plain_console(stderr=True), _LoadOnce()
    grid: dict[str, dict[str, Cell]] = {}
    shown: list[ShownPass] = []
    # Rows of one model together, so that each is loaded once; shown in the paper's order.
    order = sorted(((row, data) for row in rows for data in args.data), key=lambda cell: plan.roles.index(cell[0].role))
    for number, (row, data) in enumerate(order, start=1):
        if ranks.is_first:
            console.print(f"cell {number} of {len(order)}: {row.label}, {data}", soft_wrap=True)
        cell_args = _cell_arguments(args, more, row, models[row.role], data)
        results = evaluate(cell_args, ranks, console, load=load, show=partial(_keep, shown, row.label))
        found = cells_of(results[cell_args.mode], Path(data.partition(":")[2] or data).stem)
        twice = found.keys() & grid.get(row.label, {}).keys()
        if twice:
            raise UserError(f"--data: {data} holds records of {sorted(twice)}, and so does a file before it")
        grid.setdefault(row.label, {}).update(found)
    grid = {row.label: grid[row.label] for row in rows}
    text = ranks.from_first(lambda: write_table(args.out, args.name, plan, grid))
    if args.page:
        title, order_of = f"Table {plan.number}: {plan.title}", [row.label for row in rows].index
        shown.sort(key=lambda one: order_of(one.row))
        ranks.from_first(lambda: write_results_page(args.out / f"{args.name}.html", title, shown, args.page))
    if ranks.is_first:
        plain_console(width=10_000).print(text, end="")
    return grid


def _keep(shown: list[ShownPass], label: str, one: ShownPass) -> None:
    """A pass of the first rank under its row's name; of rows on the same data, the first one's tasks serve all."""

    def asked(tasks: Sequence[Task]) -> list[tuple[str, str]]:
        return [(task.id, task.fingerprint) for task in tasks]

    same = next((other.tasks for other in shown if asked(other.tasks) == asked(one.tasks)), one.tasks)
    shown.append(dataclasses.replace(one, row=label, tasks=same))


def make_redundancy_table(args: argparse.Namespace, more: list[str], ranks: Ranks) -> None:
    """Table 9: a row per data file. Raises UserError for arguments of other tables and for data without images."""
    given = {"--model": args.model, "--depths": args.depths, "--only": args.only}
    if wrong := [name for name, value in given.items() if value]:
        raise UserError(f"{', '.join(wrong)}: the table '{REDUNDANCY}' asks no model")
    limits = _limits_parser().parse_args(more)
    resize = dataclasses.replace(ResizeSettings(), **{name: side for name, side in vars(limits).items() if side})
    rows = {}
    for path in args.data:
        name = Path(path).stem
        if name in rows:
            raise UserError(f"--data: two files are called {name}")
        rows[name] = measure_file(path, resize, args.limit, args.out / "cells", ranks)
    text = ranks.from_first(lambda: write_redundancy_table(args.out, rows))
    if ranks.is_first:
        plain_console(width=10_000).print(text, end="")


class _LoadOnce:
    """Loads a model again only when another checkpoint is asked for; the last one is let go first."""

    def __init__(self) -> None:
        self._key: tuple[Any, ...] = ()
        self._model: Any = None

    def __call__(self, args: argparse.Namespace, device: Any) -> Any:
        key = (args.checkpoint, args.dtype, args.attention)
        if key != self._key:
            self._model = None
            self._model, self._key = load_checkpoint(args, device), key
        return self._model


def _models(given: list[str], roles: list[str]) -> dict[str, str]:
    """Role -> checkpoint, from `ROLE=PATH`, or a bare path where the table needs one model."""
    models: dict[str, str] = {}
    for text in given:
        role, is_named, path = text.partition("=")
        if not is_named or role not in roles:
            role, path = (roles[0] if len(roles) == 1 else ""), text
        if not role or role in models:
            raise UserError(f"--model: expected {' '.join(f'{name}=FOLDER' for name in roles)}, got {' '.join(given)}")
        models[role] = path
    if missing := [role for role in roles if role not in models]:
        raise UserError(f"--model: this table also needs {' '.join(f'{name}=FOLDER' for name in missing)}")
    return models


def _cell_arguments(
    args: argparse.Namespace, more: list[str], row: Row, checkpoint: str, data: str
) -> argparse.Namespace:
    """What `training.evaluate` is asked for one cell; its folder is named by all that the cell depends on."""
    preset, is_named, path = data.partition(":")
    if not is_named or preset not in PRESETS:
        preset, path = "as_recorded", data
    words = [checkpoint, "--data", path, "--max-new-tokens", str(args.max_new_tokens), "--limit", str(args.limit)]
    words += ["--prompt", preset, *more]
    words += ["--mode", "full" if row.strategy == "none" else "pruned"]
    if row.strategy != "none":
        words += ["--strategy", row.strategy, "--metric", row.metric, "--threshold", str(row.threshold)]
    if row.depth is not None:
        words += ["--depth", str(row.depth)]
    parsed = evaluate_command.parser().parse_args(words)
    key = json.dumps([str(Path(checkpoint).resolve()), str(Path(path).resolve()), *words[3:]])
    model = Path(checkpoint).name or "model"
    kind = row.strategy if row.strategy == "none" else f"{row.strategy}-{row.metric}-{row.threshold:g}"
    parsed.out = args.out / "cells" / f"{model}-{Path(path).stem}-{kind}-{xxhash.xxh3_64(key.encode()).hexdigest()[:8]}"
    return parsed


def _limits_parser() -> argparse.ArgumentParser:
    """The arguments of training.evaluate that the table of redundancy knows."""
    parser = argparse.ArgumentParser(prog="training.tables redundancy", allow_abbrev=False)
    for name in ("--min-pixels", "--max-pixels"):
        parser.add_argument(name, type=int)
    return parser


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        example="python -m training.tables grounding --model full=runs/tutorial/start pruned=runs/tutorial/start "
        "--data data_tools/samples/eval.jsonl --out runs/tables --limit 2 --max-new-tokens 8",
        prog="training.tables",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="Other arguments are those of training.evaluate and hold for every cell, such as --batch-size 16.\n\n"
        + "\n".join(f"  {name:13} Table {plan.number}: {plan.title}" for name, plan in TABLES.items())
        + f"\n  {REDUNDANCY:13} Table 9: redundancy of the images of each file; asks no model",
    )
    add = parser.add_argument
    add("name", choices=(*TABLES, REDUNDANCY), help="which table")
    add("--model", nargs="+", default=[], metavar="[ROLE=]FOLDER", help="a model folder per role of the table")
    add("--data", nargs="+", required=True, metavar="[PRESET:]FILE", help="records with targets, a file per benchmark")
    add("--out", type=Path, default=Path("runs/tables"), help="folder of the cells and tables (default runs/tables)")
    add("--max-new-tokens", type=int, default=512, help="as the paper's documents (default 512)")
    add("--limit", type=int, default=0, help="only the first n records of every file; 0 takes all")
    add("--depths", nargs="+", type=int, default=[], metavar="K", help="table depth: layers, -1 before the first")
    add("--page", type=int, default=100, metavar="N", help="records shown in TABLE.html; 0 writes none (default 100)")
    add("--only", nargs="+", default=[], metavar="ROW", help="only these rows")
    return parser


if __name__ == "__main__":
    set_up_logging()
    leave_process(main())
