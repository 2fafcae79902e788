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

    def _serve(self) -> None:
        try:
            run = self._start()
            while (item := self._rows.get()) is not _CLOSE:
                step, metrics = item
                run.log(metrics, step=step)
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
        logger.info("wandb: offline; upload later with `wandb sync %s`", Path(run.dir).parent)
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
