"""How far a long piece of work is: a moving bar on a terminal, a line every 15 seconds in a log file."""

from __future__ import annotations

import time
from typing import ClassVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from pixelprune.command.console import plain_console

__all__ = ["ProgressLine"]

_SECONDS_BETWEEN_LINES = 15.0


class ProgressLine:
    """Shown from its making until `close`, or for a `with` block; on stderr unless a console is given.

    what: the name of the work; total: how much of it there is, of which `start` is done already. in_percent: the total
    counts what nobody asks about (bytes). is_shown: False on ranks that do not speak. speaks_at_once: in a log file the
    first `update` gives a line too; the last one always does, unless a result follows that says more (ends_silently).
    A terminal shows the newest of several: an evaluation's in place of its run's.
    """

    _on_terminal: ClassVar[list[Progress]] = []

    def __init__(
        self,
        what: str,
        total: int,
        *,
        start: int = 0,
        in_percent: bool = False,
        is_shown: bool = True,
        speaks_at_once: bool = False,
        ends_silently: bool = False,
        console: Console | None = None,
    ):
        self.console = console or plain_console(stderr=True)
        self.what, self.total, self.start, self.num_done = what, total, start, start
        self.in_percent, self.is_shown = in_percent, is_shown and total > start
        self.ends_silently = ends_silently
        self._first: tuple[int, float] | None = None
        self._last_line = -_SECONDS_BETWEEN_LINES if speaks_at_once else time.monotonic()
        self._unsaid = ""
        self._bar: Progress | None = None
        if self.is_shown and self.console.is_terminal:
            columns = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=24))
            status = TextColumn("{task.fields[status]}", markup=False)
            self._bar = Progress(*columns, status, TimeElapsedColumn(), console=self.console)
            self._task = self._bar.add_task(what, total=total, completed=start, status=self._words(""))
            if self._on_terminal:
                self._on_terminal[-1].stop()
            self._on_terminal.append(self._bar)
            self._bar.start()

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, num_done: int, status: str = "") -> None:
        """`num_done` of the total are done; status: what else there is to say now."""
        self.num_done = num_done
        self._first = self._first or (num_done, time.monotonic())
        if self._bar is not None:
            self._bar.update(self._task, completed=num_done, status=self._words(status))
            return
        if not self.is_shown:
            return
        self._unsaid = f"{self.what} {self._words(status)}"
        now = time.monotonic()
        # A file's last bytes are read long before its last record is made.
        is_last = num_done == self.total and not (self.in_percent or self.ends_silently)
        if now - self._last_line >= _SECONDS_BETWEEN_LINES or is_last:
            self._last_line = now
            self._say_unsaid()

    def advance(self, num: int = 1, status: str = "") -> None:
        """`num` more are done."""
        self.update(self.num_done + num, status)

    def say(self, message: str) -> None:
        """A line of its own, above the bar."""
        if self.is_shown:
            self.console.print(message, soft_wrap=True)

    def close(self) -> None:
        if self._bar is not None and self._bar in self._on_terminal:
            self._bar.stop()
            self._on_terminal.remove(self._bar)
            if self._on_terminal:
                self._on_terminal[-1].start()
        if not self.ends_silently:
            self._say_unsaid()

    def _say_unsaid(self) -> None:
        if self._unsaid:
            self.say(self._unsaid)
            self._unsaid = ""

    def _words(self, status: str) -> str:
        share = f"{self.num_done / self.total:.0%}" if self.in_percent else f"{self.num_done}/{self.total}"
        return "  ".join(part for part in (share, status, self._time_left()) if part)

    def _time_left(self) -> str:
        """From what came after the first piece, which is slow in ways that do not come again: processes start, code is
        compiled, caches are cold."""
        num_first, first = self._first or (self.num_done, 0.0)
        num = self.num_done - num_first
        if num <= 0 or self.num_done >= self.total:
            return ""
        seconds = time.monotonic() - first
        return f"ETA {_duration(seconds / num * (self.total - self.num_done))}"


def _duration(seconds: float) -> str:
    minutes, secs = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{secs:02d}" if hours else f"{minutes}:{secs:02d}"
