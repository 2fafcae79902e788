"""`python -m data_tools recording`: recordings of screens -> conversations with images."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_tools.convert.output import finish
from data_tools.recording.conversations import RecordingReader
from data_tools.recording.frames import FrameSettings
from data_tools.records import write_jsonl
from pixelprune.command import ProgressLine

_HELP = """\
Turn recordings of screens into records with images: of each video the frames that differ from the one taken before,
each behind the time it began at, as text (<12.5 seconds>, as Qwen3-VL writes times).

Read: JSON lines whose messages hold parts {"type": "video", "video": "a.mp4"}, or video files with --question, which
become prompts without an answer. Paths are relative to the file's folder and never leave it.

The screen is looked at --per-second times in a second of the video. A frame is taken when more than --min-change of its
32x32 blocks differ from the last one taken, by more than the noise of the codec. A video that changes more than
--max-frames times is left out, not cut. What is left out is counted under its reason, in OUT.report.json too.

Needs the extra `recordings` (PyAV).
"""


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "recording",
        help="recordings of screens -> conversations with images",
        example="python -m data_tools recording RECORDING --out data/recording",
        description=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    defaults = FrameSettings()
    add("inputs", nargs="+", type=Path, metavar="FILE", help="JSON lines with video parts, or video files")
    add("--out", type=Path, required=True, help="JSONL file to write; frames go to images/ beside it")
    add("--overwrite", action="store_true", help="replace --out if it exists")
    add("--question", default="", help="what is asked about video files that are given by themselves")
    add("--per-second", type=float, default=defaults.per_second, help="looks in a second (%(default)s)")
    add("--min-change", type=float, default=defaults.min_change, help="share of blocks that differ (%(default)s)")
    add("--tolerance", type=float, default=defaults.tolerance, help="mean difference of a block, of 255 (%(default)s)")
    add("--max-frames", type=int, default=defaults.max_frames, help="in a video (%(default)s)")
    add("--max-seconds", type=float, default=defaults.max_seconds, help="of a video (%(default)s)")
    add("--sheet", type=int, default=12, metavar="N", help="records drawn to look at (%(default)s)")
    parser.set_defaults(run=run)


def _settings(options: argparse.Namespace) -> FrameSettings:
    if not 0 < options.per_second <= 60:
        raise ValueError(f"--per-second: expected a number above 0 up to 60, got {options.per_second}")
    if not 0 <= options.min_change < 1:
        raise ValueError(f"--min-change: expected a share from 0 up to 1, got {options.min_change}")
    for flag in ("tolerance", "max_frames", "max_seconds"):
        if getattr(options, flag) < (flag == "max_frames"):
            raise ValueError(f"--{flag.replace('_', '-')}: too small, got {getattr(options, flag)}")
    names = ("per_second", "min_change", "tolerance", "max_frames", "max_seconds")
    return FrameSettings(**{name: getattr(options, name) for name in names})


def run(options: argparse.Namespace) -> None:
    """Convert. Raises ValueError for wrong options, a missing file, and when no record came out."""
    settings = _settings(options)
    if missing := [path for path in options.inputs if not path.is_file()]:
        raise ValueError(f"no such file: {missing[0]}")
    if options.out.exists() and not options.overwrite:
        raise ValueError(f"--out {options.out} exists already; pass --overwrite to replace it")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    reader = RecordingReader(options.out.parent, settings, options.question)

    def records() -> Iterator[dict[str, Any]]:
        with ProgressLine("files", len(options.inputs)) as progress:
            for number, path in enumerate(options.inputs, 1):
                for record in reader.records(path):
                    progress.update(number - 1, f"{reader.frames['taken']} frames")
                    yield record
                progress.update(number, f"{reader.frames['taken']} frames")

    count = write_jsonl(options.out, records())
    counts = {"read": reader.num_read, "written": count, **{f"frames {k}": n for k, n in reader.frames.items()}}
    finish(options, counts, {"records": reader.dropped}, Counter())
