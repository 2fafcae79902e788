"""What the model will really see of a few records: tokens as text, supervision marked, omitted blocks veiled."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
from PIL import Image
from rich.console import Console
from rich.text import Text

from pixelprune.images.image import PrunedImage, decode_image, resize_image
from pixelprune.records.images import read_image
from pixelprune.records.keys import KeyCounts, KeyRules, Level
from pixelprune.records.prepare import PreparedRecord, Preparer, PrepareSettings
from pixelprune.records.reader import parse_record
from pixelprune.records.record import RecordError
from pixelprune.selection.overlay import draw_overlay
from pixelprune.settings import BLOCK
from training.data.columns import unread_columns
from training.data.settings import SourceSettings
from training.data.sources import Source, open_sources
from training.errors import UserError

KEY_RECORDS = 1000
"""Records of a source, evenly over it, whose keys are counted."""
SUPERVISED = "bold green"
IMAGE = "bold cyan"


def inspect(
    settings: list[SourceSettings],
    prepare: PrepareSettings,
    console: Console,
    folder: Path,
    *,
    num: int,
    index_dir: str = "",
) -> None:
    """Print `num` records of every source and write their pictures to `folder`. Raises UserError for unusable data."""
    try:
        sources, preparer = open_sources(settings, index_dir), prepare.build()
    except (ValueError, OSError) as error:
        raise UserError(str(error).splitlines()[0]) from error
    folder.mkdir(parents=True, exist_ok=True)
    console.print(Text.assemble("Supervised tokens look ", ("like this", SUPERVISED), "."))
    for source in sources:
        for row in spread(len(source), num):
            _inspect_record(source, row, preparer, console, folder)
        _print_keys(source, preparer.rules, console)


def spread(num_rows: int, num: int) -> list[int]:
    """Up to `num` rows, evenly over the source."""
    return sorted({int(row) for row in np.linspace(0, num_rows - 1, min(num, num_rows)).round()})


def _print_keys(source: Source, rules: KeyRules, console: Console) -> None:
    """What became of the source's keys: read, ignored by a rule, refused."""
    rows = spread(len(source), KEY_RECORDS)
    console.rule(f"{source.name}: keys of {len(rows)} of {len(source)} records", align="left", style="dim")
    for line in describe_keys(count_keys(source, rows, rules)):
        console.print(Text(line, "bold red" if line.startswith("refused") else ""), soft_wrap=True)
    unread = unread_columns(source, rules)
    if unread:
        console.print(Text(f"columns that are not read: {', '.join(unread)} (data.ignore_keys)", "bold red"))


def count_keys(source: Source, rows: list[int], rules: KeyRules) -> KeyCounts:
    """Keys of these rows by (level, key, verdict); of a refused record, those up to what it was refused for."""
    seen: KeyCounts = Counter()
    counting = replace(rules, seen=seen)
    for row in rows:
        with contextlib.suppress(RecordError):  # why is said where the record is inspected, and in the quarantine
            parse_record(source.rows[row], source.settings.format, counting)
    return seen


def describe_keys(seen: KeyCounts) -> Iterator[str]:
    """One line per verdict: the keys of every level with their counts."""
    for verdict in ("read", "ignored", "refused"):
        levels = []
        for level in get_args(Level):
            keys = sorted((key, count) for (at, key, said), count in seen.items() if (at, said) == (level, verdict))
            if keys:
                levels.append(f"{level} " + ", ".join(f"{key} {count}" for key, count in keys))
        if levels:
            yield f"{verdict}: {'; '.join(levels)}"


def _inspect_record(source: Source, row: int, preparer: Preparer, console: Console, folder: Path) -> None:
    record_id = source.record_id(row)
    console.rule(f"{record_id}  ({source.rows.where(row)})", align="left", style="dim")
    try:
        prepared = source.prepared(row, preparer)
    except RecordError as error:
        console.print(Text(f"quarantined: {error.reason}: {error}", "bold red"), soft_wrap=True)
        return
    sample = prepared.sample
    console.print(render_tokens(prepared, preparer))
    num_full = sum(image.num_full_blocks for image in sample.images)
    num_kept = sum(image.selection.num_kept for image in sample.images)
    console.print(
        f"{len(sample)} tokens ({len(sample) - num_kept + num_full} unpruned), {sample.num_supervised} supervised, "
        f"{sample.num_patches} ViT patches",
        style="dim",
    )
    for number, (ref, image) in enumerate(zip(prepared.record.images, sample.images, strict=True), start=1):
        picture = decode_image(read_image(ref, source.root), preparer.resize)
        pixels = resize_image(picture, preparer.resize, ref.wish)
        if image.unscaled_blocks:  # the baseline "resize" was given other pixels: show these
            rows, cols = image.selection.keep.shape
            grid = image.blocks.reshape(rows, cols, BLOCK, BLOCK, 3)
            pixels = grid.swapaxes(1, 2).reshape(rows * BLOCK, cols * BLOCK, 3)
        overlay = draw_overlay(pixels, image.selection)
        path = folder / f"{record_id.replace(':', '-')}-image{number}.png"
        Image.fromarray(overlay).save(path)
        console.print(f"image {number}: {describe_image(image)}; {path}", style="dim", soft_wrap=True)


def describe_image(image: PrunedImage) -> str:
    """Sizes and kept blocks in words."""
    rows, cols = image.selection.keep.shape
    height, width = image.original_size
    kept, total = image.selection.num_kept, image.num_full_blocks
    return (
        f"{width} x {height} pixels, resized to {cols * BLOCK} x {rows * BLOCK}, "
        f"{kept} of {total} blocks kept ({100 * kept / total:.1f} %)"
    )


def render_tokens(prepared: PreparedRecord, preparer: Preparer) -> Text:
    """The row's tokens as text: runs of image tokens as their number, supervised tokens marked."""
    sample, text = prepared.sample, Text()
    image_number = 0
    for ids, is_supervised in runs(sample.input_ids, sample.supervised, preparer.image_token_id):
        if ids[0] == preparer.image_token_id:
            # Two images never touch: the template puts their start and end tokens between them.
            image_number += 1
            text.append(f"[image {image_number}: {len(ids)} tokens]", IMAGE)
        else:
            text.append(preparer.chat.tokenizer.decode(ids), SUPERVISED if is_supervised else "")
    return text


def runs(ids: np.ndarray, supervised: np.ndarray, image_token_id: int) -> Iterator[tuple[np.ndarray, bool]]:
    """Stretches of tokens that are all images or all text, and all supervised or none."""
    kind = 2 * (ids == image_token_id) + supervised
    edges = np.flatnonzero(np.diff(kind)) + 1
    for start, end in zip([0, *edges], [*edges, len(ids)], strict=True):
        yield ids[start:end], bool(supervised[start])
