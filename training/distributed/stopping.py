"""A request to stop: a signal to this rank, or the stop file. Ranks agree on it with `Ranks.any`, between steps."""

from __future__ import annotations

import logging
import signal
from pathlib import Path

from training.exit_codes import STOP_FILE

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Remembers that this rank was asked to stop. A signal never interrupts a step or a save."""

    def __init__(self, folder: Path):
        self._stop_file = folder / STOP_FILE
        self._asked = False
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, _frame) -> None:
        if not self._asked:
            logger.info("%s: ending what is under way, then saving", signal.Signals(number).name)
        self._asked = True

    @property
    def is_asked(self) -> bool:
        return self._asked or self._stop_file.exists()
