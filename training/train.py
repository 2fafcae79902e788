"""Train from a recipe: `deepspeed --module training.train RECIPE [key=value...]`; `--show` prints it resolved."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from pixelprune.command import CommandParser, plain_console
from training.command import run_command, set_up_logging
from training.config.recipe import load_recipe, show
from training.exit_codes import leave_process


def main(argv: list[str] | None = None) -> int:
    """The command line. User errors end with one line and exit code 2."""
    parser = CommandParser(
        example="python -m training.train configs/tutorial.yaml --show",
        prog="training.train",
        description=__doc__.splitlines()[0],
    )
    parser.add_argument("recipe", type=Path, help="YAML recipe, see configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides, e.g. optim.lr=2e-5")
    parser.add_argument("--show", action="store_true", help="print the resolved configuration and stop")
    parser.add_argument("--local_rank", type=int, default=0, help="given by the deepspeed launcher")
    args = parser.parse_intermixed_args(argv)
    return run_command(lambda: _train(args))


def _train(args: argparse.Namespace) -> int:
    config = load_recipe(args.recipe, args.overrides)
    if args.show:
        from training.loop.dry_run import missing_paths

        sys.stdout.write(show(config))
        for line in missing_paths(config):
            plain_console(stderr=True).print(f"note: {line}", soft_wrap=True)
        return 0
    _quieten()
    from training.distributed.ranks import leave_ranks
    from training.loop.run import run

    code = run(config)
    leave_ranks()
    return code


def _quieten() -> None:
    """Leave the console to the run: notices of libraries about their own insides help no user."""
    import warnings

    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed.*")
    # requests silences it, unless another thread puts its own filters back while wandb's imports this.
    warnings.filterwarnings("ignore", message="SOCKS support in urllib3")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # each of its tries again; how it ended is said once


if __name__ == "__main__":
    set_up_logging()
    leave_process(main())
