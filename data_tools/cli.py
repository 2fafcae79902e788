"""Data brought in: screenshots rendered, corpora and benchmarks converted, sheets of records drawn."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from types import FrameType

from data_tools.render.browser import BrowserError
from pixelprune.command import CommandParser, run_command


def _terminate(signum: int, _: FrameType | None) -> None:
    raise SystemExit(128 + signum)  # unwinds, so that every `finally` runs and Chromium ends with us


def build_parser() -> CommandParser:
    """Of all commands."""
    from data_tools.convert import commands as convert_commands
    from data_tools.convert.benchmarks import commands as benchmark_commands
    from data_tools.convert.corpora import commands as corpus_commands
    from data_tools.recording import command as recording_command
    from data_tools.render import command as render_command
    from data_tools.sheet import command as sheet_command
    from data_tools.walk import command as walk_command

    parser = CommandParser(
        example="python -m data_tools sheet data_tools/samples/train.jsonl --count 4 --out runs/tutorial/sheet.png",
        prog="python -m data_tools",
        description="Get grounding data in: render it, convert it, look at it.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (
        render_command,
        walk_command,
        convert_commands,
        corpus_commands,
        benchmark_commands,
        recording_command,
        sheet_command,
    ):
        module.add_parser(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0 done, 2 wrong arguments or what else is the user's to change."""
    options = build_parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, _terminate)
    return run_command(lambda: options.run(options), expected=(ValueError, BrowserError, OSError))
