"""Requests to stop that reach the front process: SIGTERM, SIGINT, SIGUSR1, and SIGHUP of a closed terminal."""

from __future__ import annotations

import logging
import signal
import time

logger = logging.getLogger(__name__)

_ONE_PRESS_SECONDS = 0.25
"""Ctrl-C under a wrapper (make, a shell function) may arrive twice, from the terminal and from the wrapper."""


class StopRequests:
    """Within `with`, signals are noted instead of ending the process. A second SIGINT asks to end at once."""

    def __init__(self) -> None:
        self.signum: int = 0
        """The signal to hand to the ranks; 0 while nobody has asked to stop."""
        self.at_once = False
        self.requested_at = 0.0
        self._interrupted_at = 0.0
        self._earlier: dict[int, object] = {}

    def __enter__(self) -> StopRequests:
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
            # nohup and `&` of a non-interactive shell ignore SIGHUP or SIGINT on purpose: leave that as it is.
            if signal.getsignal(signum) is not signal.SIG_IGN:
                self._earlier[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._earlier.items():
            signal.signal(signum, handler)  # type: ignore[arg-type]

    def _note(self, signum: int, _frame: object) -> None:
        now = time.monotonic()
        if signum == signal.SIGINT:
            if self._interrupted_at and now - self._interrupted_at > _ONE_PRESS_SECONDS:
                self.at_once = True
            self._interrupted_at = self._interrupted_at or now
        if not self.signum:
            # To a rank all of them mean the same; SIGINT and SIGHUP are a terminal's way to say SIGTERM.
            self.signum = signal.SIGUSR1 if signum == signal.SIGUSR1 else signal.SIGTERM
            self.requested_at = now
