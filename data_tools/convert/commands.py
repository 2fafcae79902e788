"""`python -m data_tools jedi | convert`: published corpora -> records of the training format."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_tools.convert.converter import Converter, ConvertSettings, convert_all
from data_tools.convert.coordinates import ANSWERS, SYSTEMS
from data_tools.convert.dropped import DROPPED_SUFFIX
from data_tools.convert.json_stream import iter_json
from data_tools.convert.output import add_output_options, finish, open_inputs, progress_of
from data_tools.records import write_jsonl
from pixelprune.files import whole_file

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


def add_parser(commands: argparse._SubParsersAction) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    jedi = commands.add_parser(
        "jedi",
        help="Jedi -> records",
        description=_JEDI_HELP,
        formatter_class=raw,
        example="python -m data_tools jedi jedi/icon_v0122.json --images jedi/images --out data/jedi.jsonl",
    )
    convert = commands.add_parser(
        "convert",
        help="messages or ShareGPT -> records",
        description=_CONVERT_HELP,
        formatter_class=raw,
        example="python -m data_tools convert data_tools/samples/eval.jsonl --out runs/tutorial/converted.jsonl",
    )
    for name, parser in (("jedi", jedi), ("convert", convert)):
        parser.add_argument("inputs", nargs="+", type=Path, metavar="FILE", help="JSON or JSON lines")
        choices = {"choices": ANSWERS, "default": "auto"}
        parser.add_argument("--answer", **choices, help="form of rewritten answers; auto: point or box as it was")
        what = "keys of records that say nothing about training, as data.ignore_keys"
        parser.add_argument("--ignore-keys", nargs="+", default=[], metavar="KEY", help=what)
        parser.add_argument("--limit", type=int, default=None, help="stop after this many records")
        add_output_options(parser)
        parser.add_argument("--source", default=name, help="name of this source in the metadata (%(default)s)")
        parser.set_defaults(run=run_convert)
    convert.add_argument(
        "--coordinates", choices=SYSTEMS, default=None, help="rewrite answers; what their numbers mean"
    )
    convert.add_argument("--drop-system", action="store_true", help="drop system turns")
    jedi.set_defaults(coordinates="absolute", drop_system=True)


def run_convert(options: argparse.Namespace) -> None:
    """Convert the files into one JSONL file. Raises ValueError when nothing came out."""
    files, images = open_inputs(options)
    settings = ConvertSettings(
        options.source, options.coordinates, options.answer, not options.drop_system, tuple(options.ignore_keys)
    )
    dropped_file = options.out.with_suffix(DROPPED_SUFFIX)

    def records(converter: Converter) -> Iterator[dict[str, Any]]:
        for path in files:
            with progress_of(path) as progress:
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
    finish(options, counts, dropped, Counter(), report.examples)
