"""When a run is started again: after a crash or a stop that nobody asked this process for, while it gets further."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from launch.front import Outcome
from launch.stop import StopRequests
from training.exit_codes import FINISHED, RESUMABLE, USER_ERROR

logger = logging.getLogger(__name__)

_LONGEST_PAUSE_SECONDS = 300.0
_TAIL_BYTES = 1 << 16


@dataclass(frozen=True)
class RestartPolicy:
    """How often, and how soon."""

    num_restarts: int = 0
    """Restarts in a row that get no further than the run already was; progress sets the count back to zero."""
    pause_seconds: float = 10.0
    """Pause before the first restart in such a row; doubles with each, up to five minutes."""


def run_with_restarts(
    start: Callable[[], Outcome], policy: RestartPolicy, stops: StopRequests, furthest_step: Callable[[], int]
) -> int:
    """Call `start` until the run has finished, must not be restarted, or stands still. Returns the last exit code.

    The trainer resumes from its last complete checkpoint by itself. Never restarted: 0, a user's error, and a run that
    was asked to stop. Progress is a step that no earlier start has reached.
    """
    reached = furthest_step()
    num_idle = 0
    while True:
        outcome = start()
        if outcome.code in (FINISHED, USER_ERROR) or outcome.was_stopped:
            return outcome.code
        now_reached = furthest_step()
        num_idle = 0 if now_reached > reached else num_idle + 1
        reached = max(reached, now_reached)
        what = "stopped" if outcome.code == RESUMABLE else "failed"
        if num_idle > policy.num_restarts or policy.num_restarts == 0:
            if policy.num_restarts:
                logger.error("%s with code %d, %d times without getting past step %d: giving up",
                             what, outcome.code, num_idle, reached)  # fmt: skip
            return outcome.code
        pause = min(_LONGEST_PAUSE_SECONDS, policy.pause_seconds * 2 ** max(0, num_idle - 1))
        logger.warning("%s with code %d at step %d: restarting in %.0f s", what, outcome.code, reached, pause)
        if _was_stopped_during(pause, stops):
            return RESUMABLE


def furthest_logged_step(run_folder: Path) -> int:
    """The last step in metrics.jsonl, read from its end; 0 without one. A line cut short by a kill does not count."""
    path = run_folder / "metrics.jsonl"
    if not path.exists():
        return 0
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        lines = file.read().splitlines()
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            continue
    return 0


def _was_stopped_during(pause: float, stops: StopRequests) -> bool:
    until = time.monotonic() + pause
    while not stops.signum and time.monotonic() < until:
        time.sleep(min(0.1, pause))
    return bool(stops.signum)
