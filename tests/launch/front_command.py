"""A front process around any command, for the drills: `front_command.py FOLDER GRACE COMMAND...`."""

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
    # A test run started with `&` hands down an ignored SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with FolderLock(Path(sys.argv[1])) as lock, StopRequests() as stops:
        outcome = supervise(
            sys.argv[3:], stops, environment=dict(os.environ), grace_seconds=float(sys.argv[2]), lock_fd=lock.fd
        )
    sys.exit(outcome.code)
