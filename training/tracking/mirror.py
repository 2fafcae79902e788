"""A tracker beside metrics.jsonl, in a thread of its own: whatever is wrong with it never stops or slows training."""

from __future__ import annotations

import logging
import queue
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

_CLOSE_SECONDS = 60
_CLOSE = object()


@dataclass(frozen=True)
class EvaluationTable:
    """All evaluations of a run so far. rows: of one step each, with `step`; pictures: step -> what to look at."""

    rows: list[dict[str, Any]]
    pictures: dict[int, Path]

    @property
    def names(self) -> list[str]:
        """Metrics that any row has, in the order in which they came."""
        return list(dict.fromkeys(name for row in self.rows for name in row if name != "step"))


class Mirror:
    """Takes rows without waiting, from `begin` to `close`; the thread calls what a tracker implements:

    `_start`, then `_log` and `_show` in the order of `log` and `show`, then `_finish`. An error in any of them is
    logged, and the mirror is off from there on.
    """

    name = ""

    def __init__(self) -> None:
        self._items: queue.SimpleQueue = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name=self.name, daemon=True)

    def begin(self) -> None:
        self._thread.start()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """The numbers after `step` optimizer steps."""
        self._items.put((self._log, step, metrics))

    def show(self, step: int, table: EvaluationTable) -> None:
        """All evaluations up to the one after `step`."""
        self._items.put((self._show, step, table))

    def close(self) -> None:
        """Send what is left; give up after a minute, metrics.jsonl has everything."""
        self._items.put(_CLOSE)
        self._thread.join(_CLOSE_SECONDS)
        if self._thread.is_alive():
            logger.warning("%s did not finish within %d s; metrics.jsonl is complete", self.name, _CLOSE_SECONDS)

    def _serve(self) -> None:
        try:
            self._start()
            while (item := self._items.get()) is not _CLOSE:
                take, step, content = item
                take(step, content)
            self._finish()
        except Exception:
            # A tracker is no reason to lose a run of days; every row is in metrics.jsonl.
            logger.exception("%s failed and is off for the rest of the run; metrics.jsonl is complete", self.name)

    def _start(self) -> None:
        raise NotImplementedError

    def _log(self, step: int, metrics: dict[str, float]) -> None:
        raise NotImplementedError

    def _show(self, step: int, table: EvaluationTable) -> None:
        raise NotImplementedError

    def _finish(self) -> None:
        raise NotImplementedError
