"""wandb in a thread of its own: a missing key, no network or a slow server never stops or slows training."""

from __future__ import annotations

import logging
import queue
import threading
from pathlib import Path
from typing import Any

from training.config.settings import TrackingSettings

logger = logging.getLogger(__name__)

_INIT_SECONDS = 20
_CLOSE_SECONDS = 60
_CLOSE = object()

STEP = "step"
"""The x axis of every chart: optimizer steps done."""
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


class WandbMirror:
    """Takes rows without waiting; its thread starts wandb (falling back to offline) and sends them."""

    def __init__(self, folder: Path, settings: TrackingSettings, run_name: str, config: dict[str, Any], run_id: str):
        self._folder, self._settings, self._run_name, self._config, self._id = (
            folder,
            settings,
            run_name,
            config,
            run_id,
        )
        self._offline_folder: Path | None = None
        self._rows: queue.SimpleQueue = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="wandb", daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._rows.put((step, metrics))

    def close(self) -> None:
        """Send what is left; give up after a minute, metrics.jsonl has everything."""
        self._rows.put(_CLOSE)
        self._thread.join(_CLOSE_SECONDS)
        if self._thread.is_alive():
            logger.warning("wandb did not finish within %d s; metrics.jsonl is complete", _CLOSE_SECONDS)
        if self._offline_folder:
            logger.info("wandb: this run is on this machine only; upload it with: wandb sync %s", self._offline_folder)

    def _serve(self) -> None:
        try:
            run = self._start()
            _define_charts(run)
            while (item := self._rows.get()) is not _CLOSE:
                step, metrics = item
                run.log({STEP: step} | {sectioned(name): value for name, value in metrics.items()}, step=step)
            run.finish()
        except Exception:
            # A tracker is no reason to lose a run of days; every row is in metrics.jsonl.
            logger.exception("wandb failed and is off for the rest of the run; metrics.jsonl is complete")

    def _start(self):
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
