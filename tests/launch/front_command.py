"""A front process around any command, for the drills: `front_command.py [--remote] FOLDER GRACE COMMAND...`.

--remote: its ranks are on other hosts.
"""

import logging
import os
import signal
import sys
from pathlib import Path

from launch.front import supervise
from launch.stop import StopRequests
from training.loop.folder_lock import FolderLock

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    ranks_are_remote = sys.argv[1] == "--remote"
    folder, grace, *command = sys.argv[2:] if ranks_are_remote else sys.argv[1:]
    # A test run started with `&` hands down an ignored SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with FolderLock(Path(folder)) as lock, StopRequests() as stops:
        outcome = supervise(
            command,
            stops,
            environment=dict(os.environ),
            grace_seconds=float(grace),
            lock_fd=lock.fd,
            ranks_are_remote=ranks_are_remote,
        )
    sys.exit(outcome.code)
