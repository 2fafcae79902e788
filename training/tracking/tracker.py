"""Where metrics go: always to metrics.jsonl in the run's folder, and to wandb unless it is disabled."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from training.config.settings import TrackingSettings
from training.tracking.metrics_file import MetricsFile, read_metrics
from training.tracking.wandb_mirror import WandbMirror

__all__ = ["Tracker", "read_metrics"]


class Tracker:
    """Writes one JSON line per row of metrics, and mirrors it to wandb. Only the first rank has one.

    On resume, rows after the restored step are cut off: they will be made again.
    """

    def __init__(
        self,
        folder: Path,
        settings: TrackingSettings,
        run_name: str,
        config: dict[str, Any],
        *,
        run_id: str = "",
        restored_step: int = 0,
        go_on: bool = False,
    ):
        """go_on: whether training outlives a row that cannot be written (checkpoint.on_error=continue)."""
        folder.mkdir(parents=True, exist_ok=True)
        # A fresh run keeps no rows of an earlier one.
        rows = [row for row in read_metrics(folder) if restored_step and row["step"] <= restored_step]
        self._file = MetricsFile(folder, rows, go_on=go_on)
        self._evaluated = {row["step"] for row in rows if "eval_loss" in row}
        self._mirror = None
        if settings.wandb != "disabled":
            self._mirror = WandbMirror(folder, settings, run_name, config, run_id)

    def has_evaluation(self, step: int) -> bool:
        """Whether a held-out loss after `step` steps is on record."""
        return step in self._evaluated

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """A row for the number of finished optimizer steps. Values that are not finite are written as null."""
        row = {"step": step, **{key: _plain(value) for key, value in metrics.items()}}
        if "eval_loss" in row:
            self._evaluated.add(step)
        self._file.append(row)
        if self._mirror is not None:
            self._mirror.log(step, metrics)

    def close(self) -> None:
        self._file.close()
        if self._mirror is not None:
            self._mirror.close()


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
