"""Pictures and a table of one or several runs: `python -m training.report RUN [RUN...] [-o FOLDER]`."""

from __future__ import annotations

import sys
from pathlib import Path

from pixelprune.command import CommandParser, plain_console
from training.command import run_command
from training.tracking.report import report


def main(argv: list[str] | None = None) -> int:
    parser = CommandParser(
        example="python -m training.report runs/tutorial/pruned runs/tutorial/full -o runs/tutorial",
        prog="training.report",
        description=__doc__.splitlines()[0],
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders (they hold metrics.jsonl)")
    parser.add_argument("-o", "--out", type=Path, help="folder of the pictures; the first run's by default")
    args = parser.parse_args(argv)
    return run_command(lambda: report(args.runs, args.out or args.runs[0], plain_console()))


if __name__ == "__main__":
    sys.exit(main())
