"""What a rank's exit code tells whoever started it (launch/, Slurm scripts, own loops), and how a rank ends."""

from __future__ import annotations

import atexit
import os
import sys
import threading
from typing import NoReturn

FINISHED = 0
"""The run reached its last step."""

USER_ERROR = 2
"""The recipe or the data is wrong: starting again would fail again, so it is never restarted."""

RESUMABLE = 85
"""Stopped on request (SIGTERM, SIGINT, SIGUSR1 or the stop file): start the same command again to continue.

It goes on from the newest complete checkpoint: the stop's own, unless no step had been made or, with
checkpoint.on_error=continue, that save failed (the log tells)."""

STOP_FILE = "stop"
"""A file of this name in the run's folder asks the ranks to stop as a signal does; it reaches ranks on other hosts."""


def leave_process(code: int) -> NoReturn:
    """End this process with what `sys.exit` does, but without taking the interpreter down.

    A thread of gloo or autograd that drops a tensor meanwhile asks the dying interpreter for its lock, which ends in an
    abort ("terminate called without an active exception"). It was seen once in about 600 ends of ranks on a busy
    machine: a run that did all of its work would count as failed.
    """
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
