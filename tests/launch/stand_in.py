"""A rank without a model: `stand_in.py [--local_rank=N] FOLDER MODE`, started by the real launcher.

It writes `rank-N.pid`, installs handlers, says `rank-N.ready`, counts signals in `rank-N.signals` and, asked to stop,
"saves" and exits with the resumable code once all ranks have, as the trainer does.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

RESUMABLE = 85

_WORKER = """
import pathlib, signal, sys, time
name = pathlib.Path(sys.argv[1])
for signum in [] if int(sys.argv[2]) else [signal.SIGTERM, signal.SIGUSR1]:
    signal.signal(signum, lambda *_: name.with_suffix(".signalled").touch())
name.with_suffix(".listening").touch()
while True:
    time.sleep(600)
"""


def main() -> None:
    folder, mode = Path(sys.argv[-2]), sys.argv[-1]
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    received: list[int] = []
    (folder / f"rank-{rank}.pid").write_text(str(os.getpid()))
    dies_like_a_broken_collective = mode.startswith("exit-")
    if mode != "no-handlers" and not dies_like_a_broken_collective:
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(signum, lambda signum, _: received.append(signum))
    # A loader worker in a session of its own, which nothing but SIGKILL ends (in a crash DeepSpeed would wait 30 s for
    # it) and which tells when it gets a signal that was meant for ranks.
    worker = subprocess.Popen(
        [sys.executable, "-c", _WORKER, str(folder / f"worker-{rank}"), str(int(dies_like_a_broken_collective))],
        start_new_session=True,
    )
    while not (folder / f"worker-{rank}.listening").exists():
        time.sleep(0.02)
    (folder / f"worker-{rank}.pid").write_text(str(worker.pid))
    (folder / f"rank-{rank}.threads").write_text(os.environ.get("OMP_NUM_THREADS", ""))
    (folder / f"rank-{rank}.ready").touch()
    _wait_for(folder, "ready", world)

    if mode == "finish":
        worker.kill()
        sys.exit(0)
    if dies_like_a_broken_collective and rank == 1:
        worker.kill()
        sys.exit(int(mode.removeprefix("exit-")))
    while not received or mode == "deaf":
        time.sleep(0.02)
    time.sleep(0.3)  # the rest of the step; a signal sent twice would arrive here
    (folder / f"rank-{rank}.signals").write_text(" ".join(map(str, received)))
    _wait_for(folder, "signals", world)
    worker.kill()
    sys.exit(RESUMABLE)


def _wait_for(folder: Path, kind: str, world: int) -> None:
    while len(list(folder.glob(f"rank-*.{kind}"))) < world:
        time.sleep(0.02)


if __name__ == "__main__":
    main()
