"""Start a recipe: `python -m launch RECIPE [key=value...] [--ranks N] [--dry-run]`."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from launch.local import default_num_ranks, local_command, run_local
from training.errors import UserError


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="launch", description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--ranks", type=int, help="processes; one per GPU by default, two on the CPU")
    parser.add_argument("--dry-run", action="store_true", help="print the command instead of running it")
    args = parser.parse_args(argv)
    try:
        num_ranks = args.ranks or default_num_ranks()
        if args.dry_run:
            print(shlex.join(local_command(args.recipe, args.overrides, num_ranks)))
            return 0
        return run_local(args.recipe, args.overrides, num_ranks)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
