"""`python -m data_tools jedi | convert | screenspot | chartqa`: published corpora -> records of the training format."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.table import Table

from data_tools.convert.benchmarks.chartqa import ChartQAReader
from data_tools.convert.converter import Converter, ConvertSettings, convert_all
from data_tools.convert.coordinates import ANSWERS, SYSTEMS
from data_tools.convert.dropped import DROPPED_SUFFIX
from data_tools.convert.image_files import ImageFiles
from data_tools.convert.json_stream import iter_json
from data_tools.convert.screenspot import ScreenSpotReader
from data_tools.records import read_jsonl, write_jsonl
from data_tools.sheet.draw import make_sheet
from pixelprune.command import ProgressLine, plain_console
from pixelprune.files import whole_file, write_whole

console = plain_console(stderr=True)

_CONVERT_HELP = """\
Convert conversations to the training format (JSON lines; messages with typed content; images relative to the file).

Read: JSON arrays or JSON lines of records with
  messages       [{"role": ..., "content": text or typed parts}], images in the content or in "images", or
  conversations  [{"from": "human" | "gpt" | "system", "value": text}] with "image" or "images" (ShareGPT).
`<image>` in a text stands for the next image of the record, `<img>PATH</img>` for the image PATH.

With --coordinates, answers that give a place (pyautogui call, <tool_call> JSON with "coordinate", point or box) are
rewritten relative 0-1000 to the size of the ORIGINAL image file, and exchanges whose answer gives none are dropped.
Every drop is counted under its reason, on the terminal and in OUT.report.json.
"""
_JEDI_HELP = """\
Convert Jedi (ShareGPT-style JSON with absolute pixel coordinates in pyautogui calls, <tool_call> JSON, points, boxes).

The same as: convert --coordinates absolute --drop-system. Records keep only the exchanges whose answer gives a place;
coordinates become relative 0-1000 of the original image size; system turns are dropped because they state the screen
size that absolute coordinates meant. Every drop is counted under its reason, on the terminal and in OUT.report.json.
"""
_SCREENSPOT_HELP = """\
Convert ScreenSpot v2 (bbox x, y, width, height) or ScreenSpot Pro (bbox x1, y1, x2, y2) as published to evaluation
records. ANNOTATIONS is one JSON file or the folder of them; --images is the folder that img_filename is relative to.
metadata holds bbox (x1, y1, x2, y2 in pixels), image_size, element (text, icon) and subset (v2: desktop, mobile, web;
Pro: group), which the evaluation reports by.
"""


_CHARTQA_HELP = """\
Convert ChartQA as published to evaluation records. ANNOTATIONS is test_human.json, test_augmented.json or the folder of
both; --images is the folder png. metadata holds answers, the scorer (relaxed) and subset (human, augmented). Ask them
with the prompt preset short_answer: `python -m training.tables documents --data short_answer:chartqa.jsonl`.
"""


def add_parser(commands: argparse._SubParsersAction) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    jedi = commands.add_parser("jedi", help="Jedi -> records", description=_JEDI_HELP, formatter_class=raw)
    convert = commands.add_parser(
        "convert", help="messages or ShareGPT -> records", description=_CONVERT_HELP, formatter_class=raw
    )
    spot = commands.add_parser(
        "screenspot",
        help="ScreenSpot v2 or Pro -> evaluation records",
        description=_SCREENSPOT_HELP,
        formatter_class=raw,
    )
    for parser in (jedi, convert):
        parser.add_argument("inputs", nargs="+", type=Path, metavar="FILE", help="JSON or JSON lines")
        choices = {"choices": ANSWERS, "default": "auto"}
        parser.add_argument("--answer", **choices, help="form of rewritten answers; auto: point or box as it was")
        what = "keys of records that say nothing about training, as data.ignore_keys"
        parser.add_argument("--ignore-keys", nargs="+", default=[], metavar="KEY", help=what)
        parser.add_argument("--limit", type=int, default=None, help="stop after this many records")
    convert.add_argument(
        "--coordinates", choices=SYSTEMS, default=None, help="rewrite answers; what their numbers mean"
    )
    convert.add_argument("--drop-system", action="store_true", help="drop system turns")
    jedi.set_defaults(coordinates="absolute", drop_system=True)
    spot.add_argument("inputs", nargs="+", type=Path, metavar="ANNOTATIONS", help="JSON file(s) or their folder")
    spot.add_argument(
        "--variant", choices=("auto", "v2", "pro"), default="auto", help="auto: by the fields of each entry"
    )
    spot.add_argument(
        "--language", choices=("en", "cn"), default="en", help="instruction language, Pro only (%(default)s)"
    )
    chartqa = commands.add_parser(
        "chartqa", help="ChartQA -> evaluation records", description=_CHARTQA_HELP, formatter_class=raw
    )
    chartqa.add_argument("inputs", nargs="+", type=Path, metavar="ANNOTATIONS", help="JSON file(s) or their folder")
    readers = {"screenspot": run_screenspot, "chartqa": run_chartqa}
    for parser, name in ((jedi, "jedi"), (convert, "convert"), (spot, "screenspot"), (chartqa, "chartqa")):
        parser.add_argument(
            "--images", type=Path, default=None, help="folder of the images (default: the first input's)"
        )
        parser.add_argument("--out", type=Path, required=True, help="JSONL file to write")
        parser.add_argument("--overwrite", action="store_true", help="replace --out if it exists")
        parser.add_argument("--copy-images", action="store_true", help="link or copy images to images/ beside --out")
        parser.add_argument("--sheet", type=int, default=24, metavar="N", help="records drawn to look at (%(default)s)")
        parser.set_defaults(run=readers.get(name, run_convert))
        if name not in readers:
            parser.add_argument("--source", default=name, help="name of this source in the metadata (%(default)s)")


def _files(inputs: list[Path]) -> list[Path]:
    """The input files; folders stand for their .json and .jsonl files. Raises ValueError for what is missing."""
    files: list[Path] = []
    for path in inputs:
        if path.is_dir():
            files += sorted(p for p in path.iterdir() if _is_data(p))
        elif path.is_file():
            files.append(path)
        else:
            raise ValueError(f"no such file or folder: {path}")
    if not files:
        raise ValueError(f"no .json or .jsonl file in {', '.join(map(str, inputs))}")
    return files


def _is_data(path: Path) -> bool:
    return path.suffix.lower() in (".json", ".jsonl") and not path.name.endswith(DROPPED_SUFFIX)


def _open(options: argparse.Namespace) -> tuple[list[Path], ImageFiles]:
    files = _files(options.inputs)
    if options.out.exists() and not options.overwrite:
        raise ValueError(f"--out {options.out} exists already; pass --overwrite to replace it")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    folder = options.images or (options.inputs[0] if options.inputs[0].is_dir() else options.inputs[0].parent)
    return files, ImageFiles(folder, options.out.parent, copy=options.copy_images)


def _progress(path: Path) -> ProgressLine:
    return ProgressLine(path.name, path.stat().st_size, in_percent=True)


def run_convert(options: argparse.Namespace) -> None:
    """Convert the files into one JSONL file. Raises ValueError when nothing came out."""
    files, images = _open(options)
    settings = ConvertSettings(
        options.source, options.coordinates, options.answer, not options.drop_system, tuple(options.ignore_keys)
    )
    dropped_file = options.out.with_suffix(DROPPED_SUFFIX)

    def records(converter: Converter) -> Iterator[dict[str, Any]]:
        for path in files:
            with _progress(path) as progress:
                for record, position in convert_all(iter_json(path), converter, options.limit, path):
                    report = converter.report
                    progress.update(position, f"{report.num_written} of {report.num_read} records")
                    yield record

    with whole_file(dropped_file) as partial, partial.open("w", encoding="utf-8") as lines:
        converter = Converter(images, settings, lambda entry: print(json.dumps(entry), file=lines))
        count = write_jsonl(options.out, records(converter))
    report = converter.report
    if not report.dropped_records:
        dropped_file.unlink()
    counts = {"read": report.num_read, "written": count, "answers rewritten": report.num_answers}
    dropped = {"records": report.dropped_records, "exchanges of kept records": report.dropped_turns}
    _finish(options, counts, dropped, Counter(), report.examples)


def run_screenspot(options: argparse.Namespace) -> None:
    """Convert ScreenSpot annotations into one JSONL file. Raises ValueError when nothing came out."""
    files, images = _open(options)
    _run_reader(options, files, ScreenSpotReader(images, variant=options.variant, language=options.language))


def run_chartqa(options: argparse.Namespace) -> None:
    """Convert ChartQA's annotations into one JSONL file. Raises ValueError when nothing came out."""
    files, images = _open(options)
    _run_reader(options, files, ChartQAReader(images))


def _run_reader(options: argparse.Namespace, files: list[Path], reader: ScreenSpotReader | ChartQAReader) -> None:
    subsets: Counter[str] = Counter()

    def records() -> Iterator[dict[str, Any]]:
        for path in files:
            with _progress(path) as progress:
                for number, (entry, position) in enumerate(iter_json(path)):
                    record = reader.record(entry, path, number)
                    progress.update(position, f"{reader.num_read} entries")
                    if record is not None:
                        groups = (record["metadata"].get(key) for key in ("subset", "element"))
                        subsets[", ".join(filter(None, groups))] += 1
                        yield record

    count = write_jsonl(options.out, records())
    _finish(options, {"read": reader.num_read, "written": count}, {"entries": reader.dropped}, subsets)


def _finish(
    options: argparse.Namespace,
    counts: dict[str, int],
    dropped: dict[str, Counter[str]],
    subsets: Counter[str],
    examples: dict[str, str] | None = None,
) -> None:
    """Show the counts and write them beside the records, draw the sheet, and refuse an empty result."""
    table = Table(title=", ".join(f"{name} {number}" for name, number in counts.items()), show_header=False)
    for subset, number in sorted(subsets.items()):
        table.add_row(subset, str(number))
    for what, reasons in dropped.items():
        for reason, number in reasons.most_common():
            table.add_row(f"{what} dropped: {reason}", str(number))
    console.print(table)
    report = {**counts, "subsets": subsets, "dropped": dropped, "examples": examples or {}}
    write_whole(options.out.with_suffix(".report.json"), (json.dumps(report, indent=1) + "\n").encode())
    if not counts["written"]:
        options.out.unlink()
        raise ValueError("no record was written; the reasons are listed above")
    if options.sheet:
        picture = options.out.with_suffix(".sheet.png")
        drawn = make_sheet(read_jsonl(options.out), options.out.parent, picture, count=options.sheet)
        console.print(f"{drawn} records drawn: look at {picture}")
