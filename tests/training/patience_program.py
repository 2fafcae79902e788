"""Runs on every rank of test_engine.py: the first rank waits for the others for longer than a collective may hang."""

from __future__ import annotations

import json
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from tests.ranks import without_launcher_arguments
from training.config.settings import Config
from training.distributed.engine import join_ranks, leave_ranks, patient_barrier
from training.exit_codes import leave_process

TIMEOUT_SECONDS = 3.0


def main() -> None:
    (out,) = without_launcher_arguments(sys.argv[1:])
    ranks = join_ranks(Config())
    barrier = patient_barrier()
    dist.barrier()
    # Set once both have started: how long that takes is the machine's affair.
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=TIMEOUT_SECONDS), dist.group.WORLD)
    began = time.monotonic()
    if not ranks.is_first:
        time.sleep(2 * TIMEOUT_SECONDS)
    barrier()
    waited = time.monotonic() - began
    if ranks.is_first:
        Path(out).write_text(json.dumps({"waited": waited}))
    leave_ranks()
    leave_process(0)


if __name__ == "__main__":
    main()
