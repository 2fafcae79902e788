"""What a rank's exit code tells whoever started it: launch/, Slurm scripts, people's own loops."""

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
