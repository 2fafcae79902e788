"""How a start stands to what the run's folder holds: a new run, the same run going on, or another one (refused)."""

from __future__ import annotations

import logging
import secrets
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from training.checkpoint.checkpointer import Checkpointer, RunState
from training.checkpoint.identity import Change, changes_between
from training.config.recipe import config_from_dict
from training.config.settings import Config, ScheduleSettings
from training.errors import UserError
from training.loop.context import RunContext
from training.model.fingerprint import hash_weights
from training.model.parameters import lr_factor

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Continuation:
    """Where a run goes on.

    newest: the checkpoint to load; None for a new run. state: as it was saved.
    recipe: that of the checkpoint, which a run that is finished already was trained with.
    accepted: the changes of this start, as the model card will say them.
    """

    newest: Path | None
    state: RunState
    recipe: dict[str, Any] | None = None
    accepted: tuple[str, ...] = ()

    @property
    def going_on(self) -> RunState:
        """The state of a run that trains under the present recipe."""
        return replace(self.state, changes=[*self.state.changes, *self.accepted])

    def trained_with(self, config: Config) -> Config:
        """The recipe of a finished run, with the present wish for an export: nothing was trained with the present."""
        return config if self.recipe is None else replace(config_from_dict(self.recipe), checkpoint=config.checkpoint)


def continuation_of(context: RunContext, checkpointer: Checkpointer) -> Continuation:
    """Find the newest whole checkpoint and hold the recipe and the base model against it; every rank calls this.

    Raises UserError where the run in this folder is another one, or where what is trained would change from here on
    without run.accept_changes. Differences are logged by the first rank.
    """
    config, ranks = context.config, context.ranks
    newest = checkpointer.latest()
    base = ranks.from_first(lambda: hash_weights(config.model.path))
    if newest is None:
        return Continuation(None, RunState(tracker_id=ranks.from_first(lambda: secrets.token_hex(4)), base=base))
    state = checkpointer.state_of(newest)
    _require_base(config, state, base, newest)
    recipe = yaml.safe_load((newest / "config.yaml").read_text())
    changes = changes_between(recipe, config)
    _require_identity(changes, config, newest)
    if changes and ranks.is_first:
        logger.info("the recipe is another one than before step %d: %s", state.step, _listed(changes))
    accepted = tuple(f"step {state.step}: {change}" for change in changes if change.kind == "asked")
    return Continuation(newest, replace(state, base=base), recipe, accepted)


def _require_base(config: Config, state: RunState, base: str, newest: Path) -> None:
    if state.base and state.base != base:
        raise UserError(
            f"model.path: the weights in {config.model.path} are not those that {newest} was trained from (xxh3-128 "
            f"{base}, expected {state.base}); give that model, or take another run.name"
        )


def _require_identity(changes: list[Change], config: Config, newest: Path) -> None:
    if bound := [change for change in changes if change.kind == "bound"]:
        raise UserError(
            f"run.name={config.run.name}: {newest} is of a run with another recipe: {_listed(bound)}; take another "
            "run.name, or set them back"
        )
    asked = [change for change in changes if change.kind == "asked"]
    if asked and not config.run.accept_changes:
        raise UserError(
            f"run.name={config.run.name}: going on from {newest} would change what is trained from here on: "
            f"{_listed(asked)}; set them back, take another run.name, or say yes with run.accept_changes=true (launch "
            "--accept-changes)"
        )


def _listed(changes: list[Change]) -> str:
    return "; ".join(map(str, changes))


class LearningRate:
    """The share of the peak learning rate in every step of a run, also where its schedule changed on the way."""

    def __init__(self, schedule: ScheduleSettings, num_steps: int, state: RunState):
        """state: where the run goes on. A schedule that would have had another rate in the last step has changed."""
        self.schedule, self.num_steps = schedule, num_steps
        self.ramp: list[float] = list(state.ramp)
        self.said = ""
        if state.step == 0 or state.lr_factor < 0 or state.step >= num_steps:
            return
        if abs(self.factor(state.step - 1) - state.lr_factor) > 1e-9:
            self.ramp = [state.step, state.lr_factor, schedule.rewarm_steps] if schedule.rewarm_steps else []
            way = (
                f"reached on a line over {schedule.rewarm_steps} steps (schedule.rewarm_steps)"
                if self.ramp
                else "followed at once; schedule.rewarm_steps=N leads there on a line"
            )
            self.said = (
                f"the schedule is another one ({state.num_steps} -> {num_steps} steps): the learning rate was "
                f"{state.lr_factor:.4g} of its peak in step {state.step}, the new curve has "
                f"{lr_factor(state.step, num_steps, schedule):.4g} in step {state.step + 1}; {way}"
            )

    def factor(self, step: int) -> float:
        """For the 0-based optimizer step."""
        factor = lr_factor(step, self.num_steps, self.schedule)
        if not self.ramp:
            return factor
        first, before, length = self.ramp
        share = min(1.0, (step - first + 1) / length)
        return before + share * (factor - before)

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint after the 0-based `step` keeps of it, as fields of RunState."""
        return {"num_steps": self.num_steps, "lr_factor": self.factor(step), "ramp": self.ramp}
