"""The trained model as a Hugging Face folder: `python -m training.export RUN -o FOLDER`, without a GPU."""

from __future__ import annotations

import sys
from pathlib import Path

from pixelprune.command import CommandParser, plain_console
from training.checkpoint.export import export_checkpoint
from training.checkpoint.push import check_push, push_folder
from training.command import run_command


def main(argv: list[str] | None = None) -> int:
    parser = CommandParser(
        example="python -m training.export runs/tutorial/pruned -o runs/tutorial/model",
        prog="training.export",
        description=__doc__.splitlines()[0],
    )
    parser.add_argument("checkpoint", type=Path, help="a run's folder, or one of its checkpoints")
    parser.add_argument("-o", "--out", type=Path, required=True, help="the Hugging Face folder to write")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run code that comes with the model, if its recipe did"
    )
    parser.add_argument(
        "--push",
        metavar="OWNER/NAME",
        help="upload it to the Hugging Face hub, too, under the login of `hf auth login`",
    )
    parser.add_argument("--public", action="store_true", help="a repository that --push makes is private without this")
    args = parser.parse_args(argv)

    def export() -> None:
        if args.push:
            check_push(args.push)
        folder = export_checkpoint(args.checkpoint, args.out, trust_remote_code=args.trust_remote_code)
        plain_console().print(f"model written to {folder}", soft_wrap=True)
        if args.push:
            address = push_folder(folder, args.push, public=args.public)
            plain_console().print(f"uploaded: {address}", soft_wrap=True)

    return run_command(export)


if __name__ == "__main__":
    sys.exit(main())
