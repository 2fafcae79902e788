"""`python -m data_tools render`: HTML pages -> screenshots and grounding records."""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from rich.table import Table

from data_tools.records import read_jsonl
from data_tools.render.options import add_output_options, add_screen_options, themes_of, viewports_of
from data_tools.render.output import prepare_out
from data_tools.render.pages import RenderReport, render, split_pages
from data_tools.render.shot import RenderSettings
from data_tools.render.site import Site
from data_tools.sheet.draw import make_sheet
from pixelprune.command import ProgressLine, plain_console

console = plain_console(stderr=True)

_HELP = """\
Render HTML pages in headless Chromium and write, per screenshot, records "instruction -> click point".

Every clickable element that is fully visible becomes a candidate: its name and role are what Chromium tells assistive
technology, its box comes from the DOM, and a click at its centre (and on 7 of 9 points of its box) must land on it.
Elements are left out when hidden, covered, cut off, disabled, under 4 CSS pixels, without a name, or when no
instruction could tell them from another element of the same screenshot; every reason is counted in report.json.

The answer is the centre of the box as "(x, y)", integers 0-1000 relative to the screenshot.

Pages are treated as strangers: no network, no file outside the folder, no script unless --javascript, a time limit
each; a page that hangs or crashes Chromium is listed in report.json and does not stop the run.

Output: DIR/images/*.png, DIR/train.jsonl, DIR/eval.jsonl (with --eval-pages or --eval-fraction), DIR/report.json,
DIR/sheet.png (random records drawn, to check by eye).
"""
_EXAMPLES = """\
examples:
  python -m data_tools render docs/_build/html --out shots --viewports 390x844@2,1366x768 --max-pages 200
  python -m data_tools render site --start index.html --out shots --scrolls 3 --eval-fraction 0.2 --instructions 2
"""


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "render",
        help="HTML pages -> screenshots and grounding records",
        description=_HELP,
        epilog=_EXAMPLES,
        example="python -m data_tools render data_tools/apps --out runs/tutorial/shots --max-pages 2",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("pages", type=Path, help="a folder of HTML files (all of them, by name), or one HTML file to crawl from")
    add("--out", type=Path, required=True, help="folder to write to")
    add("--overwrite", action="store_true", help="replace what an earlier run wrote to --out")
    add(
        "--start",
        nargs="+",
        default=[],
        metavar="PAGE",
        help="crawl links from these pages instead of taking every file",
    )
    add("--max-pages", type=int, default=None, help="stop after this many pages")
    add("--shuffle", action="store_true", help="take pages in an order drawn by --seed, not by name or link")
    add_screen_options(parser, "390x844@2,820x1180,1366x768,1920x1080")
    add("--alternate-themes", action="store_true", help="one theme per page and viewport, in turn, instead of each")
    add("--scrolls", type=int, default=1, help="scroll positions per page and viewport, from the top (%(default)s)")
    add("--max-elements", type=int, default=8, help="elements per screenshot, icons and text in turn (%(default)s)")
    add("--instructions", type=int, default=1, help="instructions per element, of different templates (%(default)s)")
    add("--eval-pages", default="", help="pages (comma-separated, suffix optional) that go to eval.jsonl only")
    add("--eval-fraction", type=float, default=0.0, help="or: this share of the pages, drawn by --seed (%(default)s)")
    add("--seed", type=int, default=0, help="draws elements and templates (%(default)s)")
    add("--source", default="render", help="name of this source in ids and metadata (%(default)s)")
    add("--timeout", type=float, default=20.0, help="seconds per page, viewport and theme (%(default)s)")
    add("--javascript", action="store_true", help="let the pages' own scripts run (still without network)")
    add_output_options(parser, 24, "records")
    parser.set_defaults(run=run)


def _settings(options: argparse.Namespace) -> RenderSettings:
    for flag in ("scrolls", "max_elements", "instructions"):
        if getattr(options, flag) < 1:
            raise ValueError(f"--{flag.replace('_', '-')}: expected 1 or more, got {getattr(options, flag)}")
    return RenderSettings(
        viewports=viewports_of(options),
        themes=themes_of(options),
        alternate_themes=options.alternate_themes,
        num_scrolls=options.scrolls,
        max_elements=options.max_elements,
        num_instructions=options.instructions,
        seed=options.seed,
        page_timeout=options.timeout,
        javascript=options.javascript,
        source=options.source,
        png_level=options.png_level,
    )


def run(options: argparse.Namespace) -> None:
    """Crawl, split, render, report. Raises ValueError for wrong options and when no record came out."""
    settings = _settings(options)
    site = Site(options.pages, start=options.start)
    pages = site.crawl(max_pages=None if options.shuffle else options.max_pages)
    if options.shuffle:
        random.Random(options.seed).shuffle(pages)
        pages = pages[: options.max_pages]
    names = [name for name in options.eval_pages.split(",") if name]
    eval_set = split_pages(pages, eval_pages=names, eval_fraction=options.eval_fraction, seed=options.seed)
    prepare_out(options.out, overwrite=options.overwrite)
    report = RenderReport()
    with ProgressLine("pages", len(pages)) as progress:
        for report in render(site, pages, options.out, settings, eval_set, chromium=options.chromium):
            status = f"{report.num_images} images, {report.num_records.total()} records"
            progress.update(report.num_pages, status)
    show_report(report)
    if not report.num_records.total():
        raise ValueError("no record was made; the reasons are listed above")
    if options.sheet:
        files = [options.out / f"{split}.jsonl" for split in report.num_records]
        records = (record for path in files for record in read_jsonl(path))
        make_sheet(records, options.out, options.out / "sheet.png", count=options.sheet, seed=settings.seed)
        console.print(f"look at {options.out / 'sheet.png'}")


def show_report(report: RenderReport) -> None:
    """What was made and what was left out, with the reasons, on the terminal."""
    table = Table(title=f"{report.num_pages} pages in {report.seconds:.0f} s, {report.browser}", show_header=False)
    table.add_row("screenshots", str(report.num_images))
    for split, count in report.num_records.items():
        table.add_row(f"records, {split}", str(count))
    for title, counts in (
        ("screenshots left out", report.dropped_images),
        ("elements left out", report.dropped_elements),
        ("requests refused", report.blocked_requests),
    ):
        for reason, count in counts.most_common():
            table.add_row(f"{title}: {reason}", str(count))
    table.add_row("pages that failed", str(len(report.dropped_pages)))
    console.print(table)
    for page, reason in list(report.dropped_pages.items())[:20]:
        console.print(f"  {page}: {reason}")
