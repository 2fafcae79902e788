"""Where metrics go: always to metrics.jsonl in the run's folder, and to wandb unless it is disabled."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from training.config import TrackingSettings

logger = logging.getLogger(__name__)


class Tracker:
    """Writes one JSON line per row of metrics, and mirrors it to wandb. Only the first rank has one."""

    def __init__(self, folder: Path, settings: TrackingSettings, run_name: str, config: dict[str, Any]):
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "metrics.jsonl"
        self._file = self._path.open("a", buffering=1)
        self._wandb = _start_wandb(folder, settings, run_name, config)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """A row for the optimizer step (1-based count of finished steps)."""
        self._file.write(json.dumps({"step": step, **{k: _plain(v) for k, v in metrics.items()}}) + "\n")
        if self._wandb is not None:
            self._wandb.log(metrics, step=step)

    def summary(self, **values: float | str) -> None:
        if self._wandb is not None:
            self._wandb.summary.update(values)

    def close(self) -> None:
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish(quiet=True)


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """All rows of a run's metrics.jsonl."""
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _plain(value: Any) -> Any:
    return round(value, 7) if isinstance(value, float) else value


def _start_wandb(folder: Path, settings: TrackingSettings, run_name: str, config: dict[str, Any]):
    if settings.wandb == "disabled":
        return None
    import wandb

    mode = settings.wandb
    if mode == "auto":
        mode = "online" if wandb.setup().settings.api_key else "offline"
    logger.info("wandb: %s", mode)
    return wandb.init(
        project=settings.project,
        name=run_name,
        group=settings.group or None,
        tags=settings.tags or None,
        config=config,
        dir=str(folder),
        mode=mode,
        settings=wandb.Settings(silent=True, init_timeout=20),
    )
