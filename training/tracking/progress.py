"""The live line of a run: loss, samples/s, kept tokens/s, retain ratio, ETA."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

_SECONDS_BETWEEN_LOG_LINES = 15.0


class ProgressLine:
    """A moving bar on a terminal; in a log file one line every 15 seconds and at the last step."""

    def __init__(self, num_steps: int, first_step: int = 0, console: Console | None = None):
        self.console = console or Console(stderr=True, highlight=False)
        self._num_steps = num_steps
        self._first_step = first_step
        self._started = time.monotonic()
        self._last_line = 0.0
        self._bar: Progress | None = None
        if self.console.is_terminal:
            self._bar = Progress(
                TextColumn("[bold]train"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[status]}"),
                TimeElapsedColumn(),
                console=self.console,
            )
            self._task = self._bar.add_task("train", total=num_steps, completed=first_step, status="")
            self._bar.start()

    def update(self, num_done: int, metrics: dict[str, float]) -> None:
        """After optimizer step number `num_done` (1-based)."""
        status = (
            f"loss {metrics['loss']:.4f}  {metrics['samples_per_s']:.1f} samples/s  "
            f"{metrics['kept_tokens_per_s']:,.0f} kept tok/s  retain {metrics['retain_ratio']:.1%}  "
            f"ETA {_duration(self._seconds_left(num_done))}"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=num_done, status=status)
            return
        now = time.monotonic()
        if now - self._last_line >= _SECONDS_BETWEEN_LOG_LINES or num_done == self._num_steps:
            self._last_line = now
            self.console.print(f"step {num_done}/{self._num_steps}  {status}", soft_wrap=True)

    def say(self, message: str) -> None:
        """A line above the bar."""
        self.console.print(message, soft_wrap=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _seconds_left(self, num_done: int) -> float:
        per_step = (time.monotonic() - self._started) / max(1, num_done - self._first_step)
        return per_step * (self._num_steps - num_done)


def _duration(seconds: float) -> str:
    minutes, secs = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{secs:02d}" if hours else f"{minutes}:{secs:02d}"
