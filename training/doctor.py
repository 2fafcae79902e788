"""What runs on this machine, and whether it computes right: `python -m training.doctor`. First command on a new one.

One line per check: ok, FAILED, or "not here" with the reason; exit code 1 when something that training would use by
itself is wrong. Takes under two minutes, with and without a GPU.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.text import Text
from transformers.utils.logging import disable_progress_bar

from pixelprune.command import CommandParser, plain_console
from training.command import run_command
from training.diagnosis import machine, steps
from training.diagnosis.check import Bench, Check, Result, perform
from training.diagnosis.collectives import collectives
from training.diagnosis.kernels import attention_checks, chunked_head
from training.errors import UserError

COMPUTES_WRONG = 1


def main(argv: list[str] | None = None) -> int:
    """The command line. Exit code 0: nothing that training uses by default failed; 1: something did; 2: bad usage."""
    parser = CommandParser(
        example="python -m training.doctor", prog="training.doctor", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every finding with its details there, too")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where runs will be written")
    parser.add_argument("--device", choices=["cuda", "cpu"], help="default: the first GPU, or the CPU")
    args = parser.parse_args(argv)
    return run_command(lambda: examine(args))


def examine(args: argparse.Namespace) -> int:
    """Look at everything, say it line by line, and return the exit code."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU; nvidia-smi tells whether there is a driver")
    if args.json and not args.json.parent.is_dir():
        raise UserError(f"--json {args.json}: no folder {args.json.parent} to write it in")
    name = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name, 0) if name == "cuda" else torch.device(name)
    console, results = plain_console(), []
    disable_progress_bar()
    logging.disable(logging.WARNING)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            bench = Bench(device, args.runs, Path(scratch))
            for check in all_checks(device):
                with console.status(f"{check.name} ..."):  # on a terminal: some take a quarter of a minute
                    results.append(perform(check, bench))
                say(results[-1], console)
    finally:
        logging.disable(logging.NOTSET)
    if args.json:
        args.json.write_text(json.dumps([result.as_json() for result in results], indent=2) + "\n")
    wrong = [result.check.name for result in results if result.forbids_training]
    seconds = sum(result.seconds for result in results)
    if wrong:
        console.print(f"do not train here yet: {', '.join(wrong)} ({seconds:.0f} s)", soft_wrap=True)
        return COMPUTES_WRONG
    console.print(f"nothing that training uses by itself failed ({seconds:.0f} s)")
    return 0


def say(result: Result, console: Console) -> None:
    """A line, and one more where there is something to do."""
    finding = result.finding
    style = {"ok": "green", "FAILED": "bold red", "not here": "dim"}[finding.state]
    unused = "" if result.check.is_needed or finding.state != "FAILED" else " (not used unless asked for)"
    line = Text.assemble((f"{finding.state:9}", style), f"{result.check.name:28}{finding.figure}{unused}")
    console.print(line, soft_wrap=True)
    if finding.advice:
        console.print(f"{'':37}-> {finding.advice}", soft_wrap=True)


def all_checks(device: torch.device) -> list[Check]:
    """In the order in which a failure explains those after it."""
    return [
        Check("versions", machine.versions),
        Check("GPU", machine.gpu),
        Check("shared memory", machine.shared_memory),
        Check("open files", machine.open_files),
        Check("disk of the runs", machine.disk),
        Check("build lock", machine.stale_lock, is_needed=False),
        *attention_checks(device),
        Check("chunked head", chunked_head),
        Check("training step", steps.training_step),
        Check("where the host waits", steps.host_waits, is_needed=False),
        Check("upload", steps.upload),
        Check("Qwen3.5, packed and apart", steps.hybrid_rows, is_needed=False),
        Check("collectives", collectives),
        Check("fused layers (model.liger)", steps.fused_layers, is_needed=False),
        Check("compiled (model.compile)", steps.compiled_layers, is_needed=False),
    ]


if __name__ == "__main__":
    sys.exit(main())
