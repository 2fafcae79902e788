"""Table 9, redundancy: the images of each data file, each once, measured on all ranks and written down as they are."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import xxhash

from pixelprune.command import ProgressLine
from pixelprune.files import write_whole
from pixelprune.images.image import ImageError
from pixelprune.records.images import read_image
from pixelprune.records.reader import parse_record
from pixelprune.records.record import ImageRef, RecordError
from pixelprune.selection.stats import DatasetStats, ImageStats, measure_image
from pixelprune.settings import PruneSettings, ResizeSettings
from training.data.files.remote import RemoteFolder
from training.data.settings import SourceSettings
from training.data.sources import open_sources
from training.distributed.ranks import PATIENCE_MINUTES, Ranks
from training.errors import UserError

REDUNDANCY = "redundancy"
RULES = {name: PruneSettings(name) for name in ("pred2d", "raster", "serpentine")}


def measure_file(path: str, resize: ResizeSettings, limit: int, cells: Path, ranks: Ranks) -> dict[str, Any]:
    """The row of one data file: `DatasetStats.as_dict` less its images, and how many records could not be read.

    limit: only the first so many records; 0 takes all. cells: the row has a folder in it, in which a stopped
    measurement goes on, on any number of ranks. Raises UserError for data that cannot be opened or has no image.
    """
    images, num_refused = ranks.agree(lambda: _images_of(path, limit))
    if not images:
        raise UserError(f"--data {path}: no record with an image; {num_refused} records could not be read")
    key = json.dumps([str(Path(path).resolve()), dataclasses.asdict(resize), list(RULES)])
    folder = cells / f"{REDUNDANCY}-{Path(path).stem}-{xxhash.xxh3_64(key.encode()).hexdigest()[:8]}"
    ranks.from_first(lambda: _drop_cut_lines(folder))
    done = _rows(folder)
    ranks.barrier()  # all have read what is done before anyone adds to it
    pending = [name for name in images if name not in done][ranks.rank :: ranks.world_size]
    with (
        (folder / f"rank{ranks.rank:04d}.jsonl").open("a") as lines,
        ProgressLine(f"images of {path}", len(pending), is_shown=ranks.is_first) as line,
    ):
        for name in pending:
            print(json.dumps([name, _measured(*images[name], resize)]), file=lines, flush=True)
            line.update(line.num_done + 1)
    ranks.barrier(PATIENCE_MINUTES)
    return ranks.from_first(lambda: _row(_rows(folder), list(images), num_refused))


def _images_of(path: str, limit: int) -> tuple[dict[str, tuple[ImageRef, Path | RemoteFolder | None]], int]:
    """Images of the records, each once under a name that changes with its file, and how many records were refused."""
    try:
        (source,) = open_sources([SourceSettings(path)])
    except ValueError as error:
        raise UserError(str(error)) from error
    images: dict[str, tuple[ImageRef, Path | RemoteFolder | None]] = {}
    num_refused = 0
    for row in range(min(len(source), limit or len(source))):
        try:
            record = parse_record(source.rows[row], source.settings.format)
        except RecordError:
            num_refused += 1
            continue
        for number, ref in enumerate(record.images):
            images.setdefault(_name(ref, source.root, f"{row}/{number}"), (ref, source.root))
    return images, num_refused


def _name(ref: ImageRef, root: Path | RemoteFolder | None, place: str) -> str:
    if isinstance(ref.source, bytes):
        return xxhash.xxh3_128(ref.source).hexdigest()
    if not isinstance(ref.source, str):
        return place
    if isinstance(root, RemoteFolder):
        return root.describe(ref.source)
    try:
        stat = ((root or Path()) / ref.source).stat()
    except (OSError, ValueError):  # measuring it will say what is wrong
        return ref.source
    return f"{ref.source} {stat.st_size} {stat.st_mtime_ns}"


def _measured(ref: ImageRef, root: Path | RemoteFolder | None, resize: ResizeSettings) -> dict[str, Any]:
    """`ImageStats` as JSON takes it, or {"unreadable": reason}."""
    try:
        return dataclasses.asdict(measure_image(read_image(ref, root), RULES, resize, name="image"))
    except (ImageError, RecordError) as error:
        return {"unreadable": str(error)}


def _drop_cut_lines(folder: Path) -> None:
    """A kill may have cut the last line of a file short."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in folder.glob("rank*.jsonl"):
        whole, _, cut = part.read_text().rpartition("\n")
        if cut:
            write_whole(part, (whole + "\n" if whole else "").encode())


def _rows(folder: Path) -> dict[str, dict[str, Any]]:
    return dict(pair for part in sorted(folder.glob("rank*.jsonl")) for pair in _pairs(part))


def _pairs(part: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for line in part.read_text().splitlines():
        name, row = json.loads(line)
        yield name, row


def _row(rows: Mapping[str, dict[str, Any]], names: list[str], num_refused: int) -> dict[str, Any]:
    stats = DatasetStats()
    for name in names:
        row = rows[name]
        if "unreadable" in row:
            stats.unreadable.append((name, row["unreadable"]))
        else:
            sizes = {key: tuple(row[key]) for key in ("original_size", "size")}
            stats.images.append(ImageStats(**row | sizes))
    summary = stats.as_dict()
    return {**{key: value for key, value in summary.items() if key != "images"}, "num_refused": num_refused}


def write_redundancy_table(folder: Path, rows: Mapping[str, dict[str, Any]]) -> str:
    """Write redundancy.md and redundancy.json; returns the Markdown. rows: file's name -> what `measure_file` found."""
    heads = ["images", "mean size", "duplicate blocks", *(f"kept by {rule}" for rule in RULES)]
    lines = [
        "Table 9: Redundancy. Blocks that equal another block of their image, and blocks kept, in % of all blocks.",
        "",
        "| | " + " | ".join(heads) + " |",
        "|---|" + "---:|" * len(heads),
    ]
    for name, row in rows.items():
        cells = [str(row["num_images"])]
        if row["num_images"]:
            height, width = row["mean_size"]
            kept = [f"{100 * row['retain_ratio'][rule]:.1f}" for rule in RULES]
            cells += [f"{width:.0f} x {height:.0f}", f"{100 * row['duplicate_ratio']:.1f}", *kept]
        lines.append(f"| {name} | " + " | ".join([*cells, *["-"] * (len(heads) - len(cells))]) + " |")
    unreadable = sum(len(row["unreadable"]) for row in rows.values())
    refused = sum(row["num_refused"] for row in rows.values())
    if unreadable or refused:
        lines += ["", f"{unreadable} images and {refused} records could not be read and are left out."]
    text = "\n".join(lines) + "\n"
    write_whole(folder / f"{REDUNDANCY}.md", text.encode())
    content = {"table": 9, "title": "Redundancy", "rows": rows}
    write_whole(folder / f"{REDUNDANCY}.json", (json.dumps(content, indent=2) + "\n").encode())
    return text
