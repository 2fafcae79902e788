"""Train from a recipe: `deepspeed --module training.train RECIPE [key=value...]`; `--show` prints the resolved config.

The loop reads top to bottom: join the ranks, index and plan the data, build the engine, run optimizer steps.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from pathlib import Path

from training.config.recipe import load_recipe, show
from training.errors import RankError, UserError
from training.exit_codes import USER_ERROR, leave_process

SECONDS_TO_SPEAK = 10.0


def main(argv: list[str] | None = None) -> int:
    """The command line. User errors end with one line and exit code 2."""
    parser = argparse.ArgumentParser(prog="training.train", description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path, help="YAML recipe, see configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides, e.g. optim.lr=2e-5")
    parser.add_argument("--show", action="store_true", help="print the resolved configuration and stop")
    parser.add_argument("--local_rank", type=int, default=0, help="given by the deepspeed launcher")
    args = parser.parse_intermixed_args(argv)
    try:
        config = load_recipe(args.recipe, args.overrides)
        if args.show:
            sys.stdout.write(show(config))
            return 0
        _quieten()
        from training.distributed.engine import leave_ranks
        from training.loop.run import run

        code = run(config)
        leave_ranks()
        return code
    except UserError as error:
        if isinstance(error, RankError) or _is_first_here():
            sys.stderr.write(f"error: {error}\n")
        else:
            # Launchers end all ranks as the first one leaves, which must not be before the one that speaks has spoken.
            time.sleep(SECONDS_TO_SPEAK)
        return USER_ERROR


def _is_first_here() -> bool:
    """Whether this process speaks for its machine: all ranks meet the same mistakes of a recipe."""
    import torch.distributed as dist

    return dist.get_node_local_rank(fallback_rank=0) == 0


def _quieten() -> None:
    """Leave the console to the run: notices of libraries about their own insides help no user."""
    import warnings

    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed.*")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    leave_process(main())
