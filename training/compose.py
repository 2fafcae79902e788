"""A vision-language model from two checkpoints, as in section 4.4 of the paper:

python -m training.compose --vision Qwen/Qwen3-VL-2B-Instruct --language Qwen/Qwen3-1.7B --out FOLDER

Vision tower and mergers come from one checkpoint, the language model from the other: Qwen3-VL with a text-only Qwen3 or
another Qwen3-VL, Qwen3.5 with another Qwen3.5. Tensors are copied from file to file; neither model is ever held in
memory. `--random FOLDER` instead writes random weights for a model folder's configuration.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.table import Table

from pixelprune.command import CommandParser, plain_console
from training.command import run_command
from training.composition.plan import plan_composition
from training.composition.write import write_composition, write_random
from training.errors import UserError, need
from training.model.loading import DTYPES


def _local(path: str, flag: str) -> Path:
    """A model folder; a hub id is downloaded (weights and configuration) into the hub's cache."""
    if Path(path).is_dir():
        return Path(path)
    need(path.count("/") == 1 and not path.startswith((".", "/")), f"{flag}: no such model folder: {path}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, allow_patterns=["*.json", "*.txt", "*.jinja", "*.safetensors"]))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{flag}: {path} is no folder and cannot be downloaded: {str(error).splitlines()[0]}"
        ) from error


def main(argv: list[str] | None = None) -> int:
    """The command line. User errors end with one line and exit code 2."""
    parser = CommandParser(
        example="python -m training.compose --vision runs/tutorial/start --language runs/tutorial/start "
        "--out runs/composed",
        prog="training.compose",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--vision", help="Qwen3-VL or Qwen3.5 folder or hub id: vision tower, mergers, tokenizer, preprocessor"
    )
    parser.add_argument(
        "--language",
        help="folder or hub id: embedding, layers, output head. For Qwen3-VL a text-only Qwen3 or a Qwen3-VL, "
        "for Qwen3.5 a Qwen3.5, text-only or not",
    )
    parser.add_argument("--random", help="instead: random weights for the configuration in this folder")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--reinit-merger-output", action="store_true", help="allow widths to differ (see above)")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="", help="the language model's by default")
    parser.add_argument("--seed", type=int, default=0, help="of what is initialised at random")
    args = parser.parse_args(argv)
    return run_command(lambda: _compose(args))


def _compose(args: argparse.Namespace) -> None:
    console = plain_console()
    if args.random:
        write_random(_local(args.random, "--random"), args.out, dtype=args.dtype, seed=args.seed)
    else:
        need(bool(args.vision and args.language), "give --vision and --language, or --random")
        vision, language = _local(args.vision, "--vision"), _local(args.language, "--language")
        composition = plan_composition(
            vision,
            language,
            reinit_merger_output=args.reinit_merger_output,
            vision_name=args.vision,
            language_name=args.language,
        )
        write_composition(composition, vision, language, args.out, dtype=args.dtype, seed=args.seed)
        table = Table("part", "from")
        for name, value in composition.facts.items():
            table.add_row(name, value.replace("`", ""))
        console.print(table)
    console.print(f"written to {args.out}", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
