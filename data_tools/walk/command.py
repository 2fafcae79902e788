"""`python -m data_tools sessions`: interactive pages -> sessions of screenshots and actions."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.table import Table

from data_tools.records import read_jsonl
from data_tools.render.options import add_output_options, add_screen_options, themes_of, viewports_of
from data_tools.render.output import prepare_out
from data_tools.render.site import Site
from data_tools.sheet.draw import make_sheet
from data_tools.walk.run import WalkReport, WalkSettings, run_walks
from pixelprune.command import ProgressLine, plain_console

console = plain_console(stderr=True)

_HELP = """\
Walk interactive HTML pages in headless Chromium as a person would, and write what was seen and done: one screenshot
and one action per step (click, type, a key, scroll, wait), until the last step says that everything is done.

What can be done is read from the DOM; what is done is drawn by --seed. The pages' scripts run, without network, and
their clock is virtual: the same input gives the same files, however busy the machine is. Links are followed within the
folder.

The records are conversations as Qwen3-VL's published computer agents are asked: instruction and earlier actions as
text, --history screenshots with their actions, then the current screenshot and the action to be learnt. Train with
prompt: computer_use_agent, which describes the tool.

Output: DIR/images/*.png, DIR/train.jsonl, DIR/eval.jsonl (with --eval-fraction or --eval-pages), DIR/sessions.jsonl
(every step's action, its place and box in pixels, and what it did), DIR/report.json, DIR/sheet.png.
"""
_EXAMPLES = """\
examples:
  python -m data_tools sessions data_tools/apps --out runs/sessions --sessions 100 --viewports 1366x768,390x844@2
  python -m data_tools sessions data_tools/apps --out runs/growing --supervise every --history 7
"""


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "sessions",
        help="interactive HTML pages -> sessions of screenshots and actions",
        description=_HELP,
        epilog=_EXAMPLES,
        example="python -m data_tools sessions data_tools/apps --out runs/tutorial/sessions --sessions 2",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("pages", type=Path, help="a folder of HTML files, or one HTML file")
    add("--out", type=Path, required=True, help="folder to write to")
    add("--overwrite", action="store_true", help="replace what an earlier run wrote to --out")
    add("--sessions", type=int, default=24, help="how many; pages, viewports and themes take turns (%(default)s)")
    add("--steps", default="5-12", help="fewest and most steps of a session (%(default)s)")
    add_screen_options(parser, "1366x768")
    add("--history", type=int, default=4, help="screenshots before the current one (%(default)s)")
    add(
        "--supervise",
        choices=("last", "every"),
        default="last",
        help="last: a record per step, its action alone is trained on; every: sessions cut into conversations of "
        "--history + 1 screenshots, all actions trained on (%(default)s)",
    )
    add("--eval-fraction", type=float, default=0.0, help="share of the sessions that go to eval.jsonl (%(default)s)")
    add(
        "--eval-pages",
        nargs="+",
        default=[],
        metavar="PAGE",
        help="pages whose sessions go to eval.jsonl instead; sessions to train on never show them",
    )
    add("--no-caret", action="store_true", help="show no caret in text fields")
    add("--no-pointer", action="store_true", help="draw no mouse pointer")
    add("--seed", type=int, default=0, help="draws lengths and actions (%(default)s)")
    add("--source", default="sessions", help="name of this source in ids and metadata (%(default)s)")
    add("--timeout", type=float, default=120.0, help="seconds per session before it is given up (%(default)s)")
    add("--format", choices=("png", "webp"), default="png", help="of the pictures, both lossless (%(default)s)")
    add_output_options(parser, 12, "steps")
    parser.set_defaults(run=run)


def _settings(options: argparse.Namespace) -> WalkSettings:
    least, _, most = options.steps.partition("-")
    if not (least.isdigit() and (most or least).isdigit() and 2 <= int(least) <= int(most or least) <= 100):
        raise ValueError(f"--steps: expected two numbers from 2 to 100 like 5-12, got {options.steps!r}")
    if options.sessions < 1:
        raise ValueError(f"--sessions: expected 1 or more, got {options.sessions}")
    if options.history < 0:
        raise ValueError(f"--history: expected 0 or more, got {options.history}")
    if options.eval_pages and options.eval_fraction:
        raise ValueError(
            "--eval-pages: says which sessions are held out, as --eval-fraction does; expected one of them"
        )
    if not 0 <= options.eval_fraction < 1:
        raise ValueError(f"--eval-fraction: expected a number from 0 up to 1, got {options.eval_fraction}")
    return WalkSettings(
        num_sessions=options.sessions,
        num_steps=(int(least), int(most or least)),
        viewports=viewports_of(options),
        themes=themes_of(options),
        history=options.history,
        supervise=options.supervise,
        eval_fraction=options.eval_fraction,
        eval_pages=frozenset(options.eval_pages),
        caret=not options.no_caret,
        pointer=not options.no_pointer,
        seed=options.seed,
        timeout=options.timeout,
        source=options.source,
        png_level=options.png_level,
        file_format=options.format,
    )


def run(options: argparse.Namespace) -> None:
    """Walk and report. Raises ValueError for wrong options and when no session came out."""
    settings = _settings(options)
    site = Site(options.pages)
    pages = site.crawl()
    if unknown := sorted(settings.eval_pages.difference(pages)):
        raise ValueError(f"--eval-pages: expected some of {', '.join(pages)}, got {unknown[0]}")
    if settings.eval_pages.issuperset(pages):
        raise ValueError("--eval-pages: expected some of the pages, got all of them: none is left to train on")
    if settings.eval_pages and not settings.held_out(pages):
        raise ValueError(
            f"--eval-pages: none of {settings.num_sessions} sessions begins on them, pages take turns in the order "
            f"{', '.join(pages)}; expected more --sessions"
        )
    prepare_out(options.out, overwrite=options.overwrite)
    report = WalkReport()
    with ProgressLine("sessions", settings.num_sessions) as progress:
        for number, report in enumerate(run_walks(site, pages, options.out, settings, chromium=options.chromium), 1):
            progress.update(min(number, settings.num_sessions), f"{report.num_steps} steps")
    show_report(report)
    if not report.num_sessions:
        raise ValueError("no session was made; the reasons are listed above")
    if options.sheet and settings.supervise == "last":
        records = (_current(record) for split in report.num_records for record in _records(options.out, split))
        make_sheet(records, options.out, options.out / "sheet.png", count=options.sheet, seed=settings.seed)
        console.print(f"look at {options.out / 'sheet.png'}")


def _records(out: Path, split: str) -> list[dict]:
    return list(read_jsonl(out / f"{split}.jsonl"))


def _current(record: dict) -> dict:
    """The record's current screenshot and the action on it, as the sheet draws one image and one answer."""
    return {**record, "messages": record["messages"][-2:]}


def show_report(report: WalkReport) -> None:
    """What was made and what was left out, with the reasons, on the terminal."""
    table = Table(title=f"{report.num_sessions} sessions, {report.browser}", show_header=False)
    table.add_row("screenshots", str(report.num_images))
    for title, counts in (
        ("steps", report.kinds),
        ("records", report.num_records),
        ("requests refused", report.blocked_requests),
    ):
        for name, count in counts.most_common():
            table.add_row(f"{title}: {name}", str(count))
    table.add_row("sessions that failed", str(len(report.dropped_sessions)))
    console.print(table)
    for name, reason in list(report.dropped_sessions.items())[:20]:
        console.print(f"  {name}: {reason}")
