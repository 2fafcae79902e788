"""What else happens to a run: broken checkpoints, a disk that takes no more, helpers that are killed."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.parts.drill_runs import NUM_STEPS, START_SECONDS, DrillError, Run, has_equal_bits
from launch.processes import descendants, ranks_below, send
from training.checkpoint.files import checkpoint_folder, complete_checkpoints, step_of
from training.tracking.tracker import read_metrics

Ending = tuple[list[int], int]
"""Exit codes of the starts, and the steps that were made twice."""


def flipped_bit(checkpoint: Path, chance: random.Random) -> None:
    """Anywhere in the weights and moments of either rank."""
    path = chance.choice(sorted(checkpoint.glob("fragments-*.safetensors")))
    with path.open("r+b") as file:
        place = chance.randrange(path.stat().st_size)
        file.seek(place)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ 1 << chance.randrange(8)]))


def cut_in_half(checkpoint: Path, chance: random.Random) -> None:
    path = chance.choice(sorted(checkpoint.glob("fragments-*.safetensors")))
    os.truncate(path, path.stat().st_size // 2)


def empty_state(checkpoint: Path, chance: random.Random) -> None:
    os.truncate(checkpoint / "state.json", 0)


def _break_newest(run: Run, chance: random.Random, damage: Callable[[Path, random.Random], None]) -> Ending:
    """Killed at a random step, its newest checkpoint damaged, started again."""
    front = run.start(2)
    _reaches(run, front, chance.randrange(4, NUM_STEPS - 3))
    for process in descendants(front.pid):
        send(process, signal.SIGKILL)
    front.wait(START_SECONDS)
    done = _last_step(run)
    damage(checkpoint_folder(run.folder / "checkpoints", run.newest_step()), chance)
    kept = max(step_of(folder) for folder in complete_checkpoints(run.folder / "checkpoints")[:-1])
    run.finish(2)
    return [-signal.SIGKILL, 0], done - kept


def _full_disk(run: Run, chance: random.Random) -> Ending:
    """From a random step on no file of any rank grows, which is what a full disk is to them; then there is room."""
    front = run.start(2)
    _reaches(run, front, chance.randrange(1, NUM_STEPS - 4))
    for rank in ranks_below(front.pid):
        resource.prlimit(rank.pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    code = front.wait(START_SECONDS)
    lost = _last_step(run) - run.newest_step()
    run.finish(2)
    return [code, 0], lost


def _killed_worker(run: Run, chance: random.Random) -> Ending:
    """Every helper of one rank, at a random step; the run goes on by itself."""
    front = run.start(2)
    _reaches(run, front, chance.randrange(1, NUM_STEPS - 4))
    rank = chance.choice(ranks_below(front.pid))
    if not _kill_spawned(rank.pid):
        raise DrillError(f"{run.folder.name}: the rank has no loader worker; see {run.log}")
    return [front.wait(START_SECONDS)], 0


def _killed_index(run: Run, chance: random.Random) -> Ending:
    """A process that measures records, as it starts or a moment later."""
    front = run.start(2)
    deadline, delay = time.monotonic() + START_SECONDS, chance.random()
    while not any(_spawned(rank.pid) for rank in ranks_below(front.pid)):
        if front.poll() is not None or time.monotonic() > deadline:
            raise DrillError(f"{run.folder.name} starts no process for its index; see {run.log}")
        time.sleep(0.01)
    time.sleep(delay)
    for rank in ranks_below(front.pid):
        _kill_spawned(rank.pid)
    return [front.wait(START_SECONDS)], 0


DAMAGES: dict[str, tuple[Callable[[Run, random.Random], Ending], tuple[str, ...], str]] = {
    "newest checkpoint: one bit flipped": (lambda r, c: _break_newest(r, c, flipped_bit), (), "is BROKEN"),
    "newest checkpoint: a file cut in half": (lambda r, c: _break_newest(r, c, cut_in_half), (), "is BROKEN"),
    "newest checkpoint: empty state": (lambda r, c: _break_newest(r, c, empty_state), (), "is BROKEN"),
    "full disk": (_full_disk, (), "File too large"),
    "full disk, on_error=continue": (_full_disk, ("checkpoint.on_error=continue",), "going on"),
    "loader worker killed": (_killed_worker, ("data.num_workers=1",), "new ones prepare"),
    "index process killed": (_killed_index, ("data.index_workers=1", "data.index_dir={folder}/index"), "died"),
}
"""What is done -> how, the settings of the run, and words of the line that must tell of it."""


def drill_damage(folder: Path, number: int, what: str, reference: Run, chance: random.Random) -> dict:
    """One case to its end. Raises DrillError where nothing was said of it, or the last start did not finish."""
    do, settings, said = DAMAGES[what]
    run = Run(folder, f"damaged-{number}", *(one.format(folder=folder / f"damaged-{number}") for one in settings))
    codes, lost = do(run, chance)
    log = run.said()
    lines = [line for line in log.splitlines() if said in line]
    if not lines or codes[-1] != 0:
        raise DrillError(f"{what}: exit codes {codes}, {len(lines)} lines with {said!r}; see {run.log}")
    return {
        "what": what,
        "codes": codes,
        "said": said,
        "steps_again": lost,
        "equal_bits": has_equal_bits(run, reference),
        "tracebacks": log.count("Traceback"),
    }


def _last_step(run: Run) -> int:
    return max((row["step"] for row in read_metrics(run.folder)), default=0)


def _reaches(run: Run, front: subprocess.Popen, step: int) -> None:
    deadline = time.monotonic() + START_SECONDS
    while _last_step(run) < step:
        if front.poll() is not None or time.monotonic() > deadline:
            raise DrillError(f"{run.folder.name} does not reach step {step}; see {run.log}")
        time.sleep(0.01)


def _kill_spawned(pid: int) -> int:
    """Kill the processes that Python's multiprocessing spawned below this one; how many."""
    for victim in (found := _spawned(pid)):
        os.kill(victim, signal.SIGKILL)
    return len(found)


def _spawned(pid: int) -> list[int]:
    return [process.pid for process in descendants(pid) if b"spawn_main" in _command_line(process.pid)]


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""
