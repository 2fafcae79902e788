"""Where metrics go: always to metrics.jsonl in the run's folder, and to wandb unless it is disabled."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from training.checkpoint.files import write_atomically
from training.config.settings import TrackingSettings
from training.tracking.wandb_mirror import WandbMirror

METRICS_FILE = "metrics.jsonl"


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
    ):
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / METRICS_FILE
        self._cut_back(restored_step)
        self._file = self._path.open("a", buffering=1)
        self._mirror = None
        if settings.wandb != "disabled":
            self._mirror = WandbMirror(folder, settings, run_name, config, run_id)

    def _cut_back(self, restored_step: int) -> None:
        """Keep rows up to the restored step; a line that a kill cut short goes too. A fresh run keeps none."""
        rows = [row for row in read_metrics(self._path.parent) if restored_step and row["step"] <= restored_step]
        write_atomically(self._path, "".join(json.dumps(row) + "\n" for row in rows).encode())
        self._evaluated = {row["step"] for row in rows if "eval_loss" in row}

    def has_evaluation(self, step: int) -> bool:
        """Whether a held-out loss after `step` steps is on record."""
        return step in self._evaluated

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """A row for the number of finished optimizer steps. Values that are not finite are written as null."""
        row = {"step": step, **{key: _plain(value) for key, value in metrics.items()}}
        if "eval_loss" in row:
            self._evaluated.add(step)
        self._file.write(json.dumps(row) + "\n")
        if self._mirror is not None:
            self._mirror.log(step, metrics)

    def close(self) -> None:
        self._file.close()
        if self._mirror is not None:
            self._mirror.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """All whole rows of a run's metrics.jsonl; the last line may have been cut short by a kill."""
    path = folder / METRICS_FILE
    if not path.exists():
        return []
    *whole, _ = path.read_text().split("\n")
    return [json.loads(line) for line in whole]


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
