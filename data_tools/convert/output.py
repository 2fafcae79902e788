"""What every converter does around its reader: files opened, progress shown, records and their report written."""

from __future__ import annotations

import argparse
import itertools
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from rich.table import Table

from data_tools.convert.dropped import DROPPED_SUFFIX
from data_tools.convert.image_files import ImageFiles
from data_tools.records import read_jsonl, write_jsonl
from data_tools.sheet.draw import make_sheet
from pixelprune.command import ProgressLine, plain_console
from pixelprune.files import write_whole

console = plain_console(stderr=True)


class EntryReader(Protocol):
    """Turns a benchmark's entries into evaluation records; `dropped` counts what was left out and why."""

    dropped: Counter[str]
    num_read: int

    def entries(self, path: Path) -> Iterator[tuple[Any, int]]:
        """(entry, bytes of the file read so far) of one published file."""

    def record(self, entry: Any, file: Path, number: int) -> dict[str, Any] | None:
        """One evaluation record, or None where it was dropped (and counted)."""


def _files(inputs: list[Path], suffixes: tuple[str, ...]) -> list[Path]:
    """The input files; folders stand for what in them has a suffix. Raises ValueError for what is missing."""
    files: list[Path] = []
    for path in inputs:
        if path.is_dir():
            files += sorted(p for p in path.iterdir() if _is_data(p, suffixes))
        elif path.is_file():
            files.append(path)
        else:
            raise ValueError(f"no such file or folder: {path}")
    if not files:
        raise ValueError(f"no {' or '.join(suffixes)} file in {', '.join(map(str, inputs))}")
    return files


def _is_data(path: Path, suffixes: tuple[str, ...]) -> bool:
    return path.suffix.lower() in suffixes and not path.name.endswith(DROPPED_SUFFIX)


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Arguments that every converter has, about images and what is written."""
    parser.add_argument("--images", type=Path, default=None, help="folder of the images (default: the first input's)")
    parser.add_argument("--out", type=Path, required=True, help="JSONL file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace --out if it exists")
    parser.add_argument("--copy-images", action="store_true", help="link or copy images to images/ beside --out")
    parser.add_argument("--sheet", type=int, default=24, metavar="N", help="records drawn to look at (%(default)s)")


def open_inputs(
    options: argparse.Namespace, suffixes: tuple[str, ...] = (".json", ".jsonl")
) -> tuple[list[Path], ImageFiles]:
    """The input files and where their images are. Raises ValueError for what is missing or in the way."""
    files = _files(options.inputs, suffixes)
    if options.out.exists() and not options.overwrite:
        raise ValueError(f"--out {options.out} exists already; pass --overwrite to replace it")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    folder = options.images or (options.inputs[0] if options.inputs[0].is_dir() else options.inputs[0].parent)
    return files, ImageFiles(folder, options.out.parent, copy=options.copy_images)


def progress_of(path: Path) -> ProgressLine:
    return ProgressLine(path.name, path.stat().st_size, in_percent=True)


def run_reader(options: argparse.Namespace, files: list[Path], reader: EntryReader) -> None:
    """Convert the files into one JSONL file. Raises ValueError when nothing came out."""
    subsets: Counter[str] = Counter()

    def records() -> Iterator[dict[str, Any]]:
        sizes = [path.stat().st_size for path in files]
        what = files[0].name if len(files) == 1 else f"{len(files)} files"
        with ProgressLine(what, sum(sizes), in_percent=True) as progress:
            for path, before in zip(files, itertools.accumulate(sizes, initial=0), strict=False):
                for number, (entry, position) in enumerate(reader.entries(path)):
                    record = reader.record(entry, path, number)
                    progress.update(before + position, f"{reader.num_read} entries")
                    if record is not None:
                        groups = (record["metadata"].get(key) for key in ("subset", "element"))
                        subsets[", ".join(filter(None, groups))] += 1
                        yield record

    count = write_jsonl(options.out, records())
    dropped = {"entries": reader.dropped}
    if parts := getattr(reader, "dropped_parts", None):
        dropped["parts of kept entries"] = parts
    finish(options, {"read": reader.num_read, "written": count}, dropped, subsets)


def finish(
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
