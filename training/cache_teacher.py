"""Run the teacher once over a recipe's data: `python -m training.cache_teacher RECIPE [key=value...]`.

Under the launcher (`deepspeed --module training.cache_teacher RECIPE`) the ranks share the work. What is cached already
is not computed again: a run that was killed goes on where it was, and new records are added to what is there.
"""

from __future__ import annotations

import logging
from pathlib import Path

from pixelprune.command import CommandParser
from training.command import run_command, set_up_logging
from training.config.recipe import load_recipe
from training.distributed.ranks import join_ranks, leave_ranks
from training.exit_codes import leave_process
from training.loop.teacher_cache import build_cache


def main(argv: list[str] | None = None) -> int:
    """The command line. User errors end with one line and exit code 2."""
    parser = CommandParser(
        example="python -m training.cache_teacher configs/tutorial.yaml loss.kd_weight=1 kd.source=cached "
        "data.sources.0.path=data_tools/samples/eval.jsonl",
        prog="training.cache_teacher",
        description=(__doc__ or "").splitlines()[0],
    )
    parser.add_argument("recipe", type=Path, help="the recipe that will train with kd.source=cached")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="the same overrides as for training")
    parser.add_argument("--local_rank", type=int, default=0, help="given by the deepspeed launcher")
    args = parser.parse_args(argv)

    def build() -> None:
        config = load_recipe(args.recipe, args.overrides)
        build_cache(config, join_ranks(config.distributed.timeout_minutes))
        leave_ranks()

    return run_command(build)


if __name__ == "__main__":
    set_up_logging(logging.WARNING)
    leave_process(main())
