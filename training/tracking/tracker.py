"""Where metrics go: always to metrics.jsonl in the run's folder, to wandb unless disabled, and to `tracking.also`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from training.config.settings import TrackingSettings
from training.tracking.metrics_file import MetricsFile, read_metrics
from training.tracking.mirror import EvaluationTable, Mirror
from training.tracking.other_mirrors import AccelerateMirror
from training.tracking.wandb_mirror import WandbMirror

__all__ = ["Tracker", "read_metrics"]


class Tracker:
    """Writes one JSON line per row of metrics, and mirrors it to other trackers. Only the first rank has one.

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
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        # A fresh run keeps no rows of an earlier one.
        rows = [row for row in read_metrics(folder) if restored_step and row["step"] <= restored_step]
        self._file = MetricsFile(folder, rows, go_on=go_on)
        self._evaluated = {row["step"] for row in rows if "eval_loss" in row}
        self._mirrors: list[Mirror] = [
            AccelerateMirror(name, folder, settings, run_name, config, restored_step) for name in settings.also
        ]
        if settings.wandb != "disabled":
            self._mirrors.append(WandbMirror(folder, settings, run_name, config, run_id))
        for mirror in self._mirrors:
            mirror.begin()

    def has_evaluation(self, step: int) -> bool:
        """Whether a held-out loss after `step` steps is on record."""
        return step in self._evaluated

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """A row for the number of finished optimizer steps. Values that are not finite are written as null."""
        row = {"step": step, **{key: _plain(value) for key, value in metrics.items()}}
        if "eval_loss" in row:
            self._evaluated.add(step)
        self._file.append(row)
        for mirror in self._mirrors:
            mirror.log(step, metrics)

    def show_evaluations(self, step: int) -> None:
        """To the trackers: all evaluations up to this step, with the pictures of their answers."""
        if self._mirrors:
            table = evaluation_table(self.folder)
            for mirror in self._mirrors:
                mirror.show(step, table)

    def close(self) -> None:
        self._file.close()
        for mirror in self._mirrors:
            mirror.close()


def evaluation_table(folder: Path) -> EvaluationTable:
    """Held-out figures by step from a run's metrics.jsonl, with the sheets that its evaluations drew."""
    by_step: dict[int, dict[str, Any]] = {}
    for row in read_metrics(folder):
        if found := {name: value for name, value in row.items() if name.startswith("eval_")}:
            by_step.setdefault(row["step"], {"step": row["step"]}).update(found)
    pictures = {step: path for step in by_step if (path := sheet_path(folder, step)).exists()}
    return EvaluationTable(list(by_step.values()), pictures)


def sheet_path(folder: Path, step: int) -> Path:
    """Where an evaluation while training draws misses and hits."""
    return folder / "grounding" / f"step-{step:08d}.png"


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
