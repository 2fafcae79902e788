"""What the model will really see: `python -m training.inspect RECIPE [key=value...] [--num 3] [--out FOLDER]`.

Takes a few records of every source through the same preparation as training, prints their tokens as text with what is
supervised marked, and writes a picture of every image with its omitted blocks veiled.
"""

from __future__ import annotations

import sys
from pathlib import Path

from pixelprune.command import CommandParser, plain_console
from training.command import run_command
from training.config.recipe import load_recipe
from training.data.inspection import inspect
from training.loop.feed import prepare_settings
from training.model.loading import load_model_files


def main(argv: list[str] | None = None) -> int:
    """The command line. User errors end with one line and exit code 2."""
    parser = CommandParser(
        example="python -m training.inspect configs/tutorial.yaml --num 1 --out runs/tutorial/inspect",
        prog="training.inspect",
        description=(__doc__ or "").splitlines()[0],
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--num", type=int, default=3, help="records per source")
    parser.add_argument("--out", type=Path, help="folder for the pictures (default: inspect/ in the run's folder)")
    args = parser.parse_intermixed_args(argv)

    def look() -> None:
        config = load_recipe(args.recipe, args.overrides)
        folder = args.out or Path(config.run.folder) / config.run.name / "inspect"
        prepare = prepare_settings(config, load_model_files(config.model))
        inspect(config.data.sources, prepare, plain_console(), folder, num=args.num, index_dir=config.data.index_dir)

    return run_command(look)


if __name__ == "__main__":
    sys.exit(main())
