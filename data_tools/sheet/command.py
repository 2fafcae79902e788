"""`python -m data_tools sheet`: draw random records with their boxes, to be checked by a person."""

from __future__ import annotations

import argparse
from pathlib import Path

from data_tools.records import read_jsonl
from data_tools.sheet.draw import make_sheet
from pixelprune.command import plain_console

console = plain_console(stderr=True)


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "sheet",
        help="draw random records with their boxes onto one picture",
        example="python -m data_tools sheet data_tools/samples/train.jsonl --count 4 --out runs/tutorial/sheet.png",
        description="Draw random records of a JSONL file onto one PNG: the box (metadata.bbox) in red, the answer's "
        "point in blue, instruction and answer below. Tall screenshots are cut to the part around the box.",
    )
    parser.add_argument("records", type=Path, help="a JSONL file in the training format")
    parser.add_argument("--out", type=Path, default=Path("sheet.png"), help="PNG to write (%(default)s)")
    parser.add_argument("--count", type=int, default=24, help="records to draw (%(default)s)")
    parser.add_argument("--columns", type=int, default=4, help="cells side by side (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="which records are drawn (%(default)s)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    drawn = make_sheet(
        read_jsonl(options.records),
        options.records.parent,
        options.out,
        count=options.count,
        columns=options.columns,
        seed=options.seed,
    )
    console.print(f"{drawn} records drawn onto {options.out}")
