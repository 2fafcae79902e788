"""Pictures and a table of one or several runs, or a page: `python -m training.report RUN [RUN...] [--html]`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pixelprune.command import CommandParser, plain_console
from training.command import run_command
from training.run_page import NUM_SAMPLES, PAGE_FILE
from training.tracking.report import named_runs, report

_REFRESH_SECONDS = 5


def main(argv: list[str] | None = None) -> int:
    parser = CommandParser(
        example="python -m training.report runs/tutorial/pruned runs/tutorial/full -o runs/tutorial",
        prog="training.report",
        description=__doc__.splitlines()[0],
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders (they hold metrics.jsonl)")
    parser.add_argument("-o", "--out", type=Path, help="folder of the pictures; the first run's by default")
    parser.add_argument("--html", action="store_true", help=f"write {PAGE_FILE}, one self-contained page, instead")
    parser.add_argument(
        "--serve", action="store_true", help="show the page on this machine, refreshed while runs go on, until Ctrl-C"
    )
    parser.add_argument(
        "--samples", type=int, default=NUM_SAMPLES, help="records of each source on the page (default %(default)s)"
    )
    args = parser.parse_args(argv)
    if args.samples < 0:
        parser.error(f"--samples: expected 0 or more, got {args.samples}")
    return run_command(lambda: _report(args))


def _report(args: argparse.Namespace) -> None:
    console, out = plain_console(), args.out or args.runs[0]
    if not (args.html or args.serve):
        return report(args.runs, out, console)
    runs = named_runs(args.runs, may_have_begun=args.serve)
    # A page's sample records need torch and transformers, seconds that a table with its pictures does without.
    from training.run_page.document import RunPage
    from training.run_page.server import PageServer

    if args.html:
        path = RunPage(runs, num_samples=args.samples).write(out / PAGE_FILE)
        console.print(f"page: {path}", soft_wrap=True)
    if args.serve:
        page = RunPage(runs, num_samples=args.samples, refresh_seconds=_REFRESH_SECONDS)
        server = PageServer(page.current)
        console.print(f"open {server.address}", soft_wrap=True)
        console.print(f"from another machine, first: ssh -L {server.port}:127.0.0.1:{server.port} THIS_MACHINE")
        console.print("Ctrl-C ends it")
        try:
            server.serve()
        finally:
            server.close()
    return None


if __name__ == "__main__":
    sys.exit(main())
