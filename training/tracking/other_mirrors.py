"""Trackers that a recipe names beside wandb, through accelerate's classes (`tracking.also`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from training.config.settings import TrackingSettings
from training.errors import UserError
from training.tracking.mirror import EvaluationTable, Mirror
from training.tracking.wandb_mirror import PICTURE, sectioned


def check_installed(settings: TrackingSettings) -> None:
    """UserError for a tracker whose package is not here."""
    for name in settings.also:
        if find_spec(name) is None:
            raise UserError(f"tracking.also: {name} is not installed (pip install {name})")


class AccelerateMirror(Mirror):
    """One of accelerate's trackers, with the names and sections that wandb has.

    TensorBoard writes to runs/NAME/tensorboard and hides, after a resume, steps that are made again. MLflow and SwanLab
    go where their own environment variables say, and begin a run of theirs at every start of ours.
    """

    def __init__(
        self, name: str, folder: Path, settings: TrackingSettings, run_name: str, config: dict[str, Any], restored: int
    ):
        """restored: the step that the run continues from, 0 for a new one."""
        self.name = name
        super().__init__()
        self._folder, self._settings, self._run_name, self._config = folder, settings, run_name, config
        self._restored = restored

    def _start(self) -> None:
        from accelerate import PartialState
        from accelerate.tracking import MLflowTracker, SwanLabTracker, TensorBoardTracker

        PartialState()  # the trackers ask it who they are
        if self.name == "tensorboard":
            purge = {"purge_step": self._restored + 1} if self._restored else {}
            self._tracker: Any = TensorBoardTracker("tensorboard", str(self._folder), **purge)
        elif self.name == "mlflow":
            self._tracker = MLflowTracker(self._settings.project, run_name=self._run_name)
        else:
            self._tracker = SwanLabTracker(self._settings.project, experiment_name=self._run_name)
        self._tracker.start()
        if not self._restored or self.name != "tensorboard":
            self._tracker.store_init_configuration(dict(_flat(self._config)))

    def _log(self, step: int, metrics: dict[str, float]) -> None:
        self._tracker.log({sectioned(name): value for name, value in metrics.items()}, step=step)

    def _show(self, step: int, table: EvaluationTable) -> None:
        """The newest picture, where there is a place for pictures; the numbers came by `_log`."""
        picture = table.pictures.get(step)
        if picture and self.name == "tensorboard":
            with Image.open(picture) as image:
                pixels = np.asarray(image.convert("RGB"))[None]
            self._tracker.log_images({f"eval/{PICTURE}": pixels}, step=step, dataformats="NHWC")

    def _finish(self) -> None:
        self._tracker.finish()


def _flat(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys of a recipe: numbers, words and truth values as they are, lists as text."""
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, bool | int | float | str) else str(value)
