"""What a kill, a restart and a broken picture do to each trainer, started as its users start it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.parts.peers.runs import Start, kill, wait_until

SAVE_STEPS = 4
LAST_SAVE = 2 * SAVE_STEPS
"""The second save: a first one lies whole beside it."""
ERROR = re.compile(r"^\s*(?:\S+ ERROR\s+)?((?:[\w.]*(?:Error|Exception|Interrupt)\b|error:).*)$")

Rows = list[dict[str, Any]]


def drill_kill(start: Start, python: Path, undisturbed: Rows) -> dict[str, Any]:
    """SIGKILL two steps behind the first save, then the same command again with its way to resume."""
    return _killed(start, python, undisturbed, lambda: _newest(start.rows()) >= SAVE_STEPS + 2)


def drill_kill_in_save(start: Start, python: Path, undisturbed: Rows) -> dict[str, Any]:
    """SIGKILL as soon as the second save shows in the folder, then the same command again."""
    out = Path(start.job["out"])
    folders = (out / f"checkpoint-{LAST_SAVE}", out / "checkpoints" / f"step-{LAST_SAVE:08d}")
    return _killed(start, python, undisturbed, lambda: any(folder.exists() for folder in folders))


def drill_damage(start: Start, python: Path, picture: Path, undisturbed: Rows) -> dict[str, Any]:
    """A run that meets a picture cut in half. `picture` is whole again afterwards."""
    whole = picture.read_bytes()
    picture.write_bytes(whole[: len(whole) // 2])
    try:
        code = start.finish(python)
    finally:
        picture.write_bytes(whole)
    rows = start.rows()
    differs = [a["step"] for a, b in zip(rows, undisturbed, strict=False) if _distance(a, b) > 1e-3]
    return {
        "exit_code": code,
        "steps_done": len(rows),
        "names_the_picture": picture.name in start.output(),
        "other_steps": differs,
        "said": last_error(start.output()) if code else "",
    }


def _killed(start: Start, python: Path, undisturbed: Rows, is_time: Callable[[], bool]) -> dict[str, Any]:
    process = start.launch(python)
    was_alive = wait_until(is_time, process)
    if was_alive:
        kill(process)
    before = start.rows()
    code = start.finish(python, resume=True)
    again = start.rows()[len(before) :]
    by_step = {row["step"]: row for row in undisturbed}
    return {
        "was_alive": was_alive,
        "killed_behind_step": _newest(before),
        "exit_code": code,
        "goes_on_with_step": again[0]["step"] if again else None,
        "steps_at_end": _newest(again),
        "largest_difference": max((_distance(row, by_step[row["step"]]) for row in again), default=None),
        "said": last_error(start.output()) if code else "",
    }


def _newest(rows: Rows) -> int:
    return max((row["step"] for row in rows), default=0)


def _distance(a: dict[str, Any], b: dict[str, Any]) -> float:
    return abs(a["loss"] - b["loss"]) / abs(b["loss"])


def last_error(output: str) -> str:
    """The last line that looks like an error; the last line of all where none does."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    found = [match[1] for match in map(ERROR.match, lines) if match]
    return (found or lines or [""])[-1][:300]
