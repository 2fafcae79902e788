"""wandb: a missing key, no network or a slow server never stops or slows training."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from training.config.settings import TrackingSettings
from training.tracking.mirror import EvaluationTable, Mirror

logger = logging.getLogger(__name__)

_INIT_SECONDS = 20

STEP = "step"
"""The x axis of every chart: optimizer steps done."""
TABLE, PICTURE = "eval/table", "misses and hits"
"""Where the table of evaluations stands, and the name of its last column."""
_PARTS = {
    "speed": ("samples_per_s", "kept_tokens_per_s", "full_tokens_per_s", "step_s", "mfu", "rank_imbalance"),
    "memory": ("peak_memory_gb", "host_memory_gb"),
    "data": ("retain_ratio", "num_samples", "num_supervised", "shared_prefix", "shared_vision"),
    "optim": ("grad_norm", "num_skipped"),
}
_BEGINNINGS = {"eval_": "eval", "lr_": "optim"}
_SECTIONS = ("train", "eval", *_PARTS)
_SUMMARIES = {"train/loss": "last,min", "eval/loss": "last,min", "eval/accuracy": "last,max"}
"""What the table of runs shows of a curve; of others the last value."""


def sectioned(metric: str) -> str:
    """A metric's name in wandb, which groups charts by what stands before the slash."""
    for section, names in _PARTS.items():
        if metric in names:
            return f"{section}/{metric}"
    for beginning, section in _BEGINNINGS.items():
        if metric.startswith(beginning):
            return f"{section}/{metric if section == 'optim' else metric.removeprefix(beginning)}"
    return f"{'speed' if metric.endswith('_share') else 'train'}/{metric}"


class WandbMirror(Mirror):
    """Falls back to offline where wandb cannot be reached; an offline run ends with the line that uploads it."""

    name = "wandb"

    def __init__(self, folder: Path, settings: TrackingSettings, run_name: str, config: dict[str, Any], run_id: str):
        super().__init__()
        self._folder, self._settings, self._run_name, self._config, self._id = (
            folder,
            settings,
            run_name,
            config,
            run_id,
        )
        self._offline_folder: Path | None = None

    def close(self) -> None:
        super().close()
        if self._offline_folder:
            logger.info("wandb: this run is on this machine only; upload it with: wandb sync %s", self._offline_folder)

    def _start(self) -> None:
        self._run = self._joined()
        _define_charts(self._run)

    def _log(self, step: int, metrics: dict[str, float]) -> None:
        self._run.log({STEP: step} | {sectioned(name): value for name, value in metrics.items()}, step=step)

    def _show(self, step: int, table: EvaluationTable) -> None:
        """The whole table again: wandb shows the newest, and keeps pictures that it has."""
        import wandb

        rows = []
        for row in table.rows:
            picture = table.pictures.get(row["step"])
            shown = wandb.Image(str(picture)) if picture else None
            rows.append([row["step"], *(row.get(name) for name in table.names), shown])
        columns = [STEP, *(name.removeprefix("eval_") for name in table.names), PICTURE]
        self._run.log({STEP: step, TABLE: wandb.Table(columns=columns, data=rows)}, step=step)

    def _finish(self) -> None:
        self._run.finish()

    def _joined(self):
        import wandb

        mode = self._settings.wandb
        if mode == "auto":
            mode = "online" if wandb.setup().settings.api_key else "offline"
        if mode == "online":
            try:
                return self._init(wandb, "online")
            except Exception as error:  # noqa: BLE001 - whatever it is, offline mode needs no server
                logger.warning("wandb: online mode failed (%s); continuing offline", str(error).splitlines()[0])
                wandb.teardown()  # its service still holds the run's id, and would refuse it
        run = self._init(wandb, "offline")
        self._offline_folder = Path(run.dir).parent
        logger.info("wandb: offline, in %s", self._offline_folder)
        return run

    def _init(self, wandb, mode: str):
        return wandb.init(
            project=self._settings.project,
            name=self._run_name,
            group=self._settings.group or None,
            tags=self._settings.tags or None,
            config=self._config,
            dir=str(self._folder),
            mode=mode,
            id=self._id or None,
            resume="allow" if mode == "online" else None,
            settings=wandb.Settings(silent=True, init_timeout=_INIT_SECONDS),
        )


def _define_charts(run: Any) -> None:
    run.define_metric(STEP, hidden=True)
    for section in _SECTIONS:
        run.define_metric(f"{section}/*", step_metric=STEP)
    for name, summary in _SUMMARIES.items():
        run.define_metric(name, step_metric=STEP, summary=summary)
