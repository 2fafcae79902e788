"""Runs on both ranks of test_ranks.py: what each decides, meets and sums; every rank's notes go to the first's file."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from tests.ranks import without_launcher_arguments
from training.config.settings import ConfigError
from training.distributed.ranks import PATIENCE_MINUTES, Ranks, join_ranks, leave_ranks
from training.errors import RankError, UserError
from training.exit_codes import leave_process

TIMEOUT_SECONDS = 2.0


def main() -> None:
    (out,) = without_launcher_arguments(sys.argv[1:])
    ranks = join_ranks()
    notes = ranks.gather({**answers(ranks), **errors(ranks)})
    waited = patience(ranks)
    if ranks.is_first:
        Path(out).write_text(json.dumps({"notes": notes, "waited": waited}))
    leave_ranks()
    leave_process(0)


def answers(ranks: Ranks) -> dict:
    number = torch.tensor([ranks.rank + 1, 10], dtype=torch.float64)
    calls: list[int] = []
    return {
        "from_first": ranks.from_first(lambda: {"rank": ranks.rank, "calls": calls.append(1)}),
        "calls": len(calls),
        "agree": ranks.agree(lambda: ranks.rank),
        "any": [ranks.any(False), ranks.any(ranks.rank == 1)],
        "any_of": ranks.any_of(ranks.rank == 0, False, ranks.rank == 1),
        "sum": ranks.sum(number).tolist(),
        "max": ranks.max(number).tolist(),
        "min": ranks.min(number).tolist(),
        "untouched": number.tolist(),
        "gather": ranks.gather(ranks.rank),
        "here": ranks.world_size_per_node,
    }


def errors(ranks: Ranks) -> dict:
    def fail(error: Exception, *, on: tuple[int, ...] = (0, 1)) -> None:
        if ranks.rank in on:
            raise error

    return {
        "first refuses": met(lambda: ranks.from_first(lambda: fail(ConfigError("no room")))),
        "first breaks": met(lambda: ranks.from_first(lambda: fail(KeyError("x")))),
        "first's own": met(lambda: ranks.from_first(lambda: fail(RankError("disk full")))),
        "all refuse": met(lambda: ranks.agree(lambda: fail(ConfigError("no data")))),
        "second refuses": met(lambda: ranks.agree(lambda: fail(UserError("no such file"), on=(1,)))),
        "second breaks": met(lambda: ranks.agree(lambda: fail(KeyError("x"), on=(1,)))),
        # Nobody is a collective behind.
        "sum after": ranks.sum(torch.tensor([ranks.rank])).tolist(),
    }


def met(do: Callable[[], object]) -> str:
    try:
        do()
    except Exception as error:  # noqa: BLE001 - the test reads which
        return f"{type(error).__name__}: {error}"
    return "nothing"


def patience(ranks: Ranks) -> list[float]:
    """Seconds that the first rank waits for the second in a patient barrier, and then in a collective that hangs."""
    ranks.barrier()
    # Set once both have started: how long that takes is the machine's affair.
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=TIMEOUT_SECONDS), ranks.group)
    if not ranks.is_first:
        time.sleep(2 * TIMEOUT_SECONDS)
        ranks.barrier(PATIENCE_MINUTES)
        time.sleep(2 * TIMEOUT_SECONDS)
        return []
    began = time.monotonic()
    ranks.barrier(PATIENCE_MINUTES)
    waited = time.monotonic() - began
    assert met(lambda: ranks.any(True)).startswith(("RuntimeError", "DistBackendError"))
    return [waited, time.monotonic() - began - waited]


if __name__ == "__main__":
    main()
