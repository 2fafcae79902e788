"""What a run is measured by while it trains: held-out loss, and grounding answers that keep the best model."""

from __future__ import annotations

from pathlib import Path

from training.checkpoint.export import export_model
from training.distributed.engine_protocol import Engine
from training.evaluation.during_training import GroundingEvaluator
from training.loop.context import RunContext
from training.loop.held_out_loss import Validator
from training.loop.journal import Journal


class Evaluations:
    """Runs what is due after a step; every rank calls it, the journal writes it down.

    A request to stop interrupts an evaluation, on all ranks: the time that a scheduler leaves is for the checkpoint.
    The next start makes it up (`catch_up`).
    """

    def __init__(
        self,
        context: RunContext,
        num_steps: int,
    ):
        """Indexes the held-out records. Raises UserError for what is wrong with them, StopAskedError when stopped."""
        self.context, self.num_steps = context, num_steps
        self.validator = Validator.build(context)
        self.grounding = _grounding(context)

    def catch_up(self, engine: Engine, num_done: int, journal: Journal) -> bool:
        """At a start: what is due before the first step, or was as the run stopped between save and evaluation.

        Returns what `after` returns.
        """
        validates = self._validation_is_due(num_done) and not self.context.ranks.any(journal.has_evaluation(num_done))
        if self.grounding:
            self.grounding.restore(num_done)
        return self._evaluate(engine, num_done, journal, validates)

    def after(self, engine: Engine, num_done: int, journal: Journal) -> bool:
        """After `num_done` steps. Whether a stop was asked for meanwhile, the same on all ranks."""
        return self._evaluate(engine, num_done, journal, self._validation_is_due(num_done))

    def _evaluate(self, engine: Engine, num_done: int, journal: Journal, validates: bool) -> bool:
        answers = bool(self.grounding and self.grounding.is_due(num_done, self.num_steps))
        if validates and not self._validate(engine, num_done, journal):
            return True
        if answers and not self._ground(engine, num_done, journal):
            return True
        return (validates or answers) and self.context.is_stopping()

    def _validation_is_due(self, num_done: int) -> bool:
        settings = self.context.config.eval
        if not self.validator:
            return False
        if num_done == 0:
            return settings.at_start
        every = settings.every_steps
        return num_done == self.num_steps or (every > 0 and num_done % every == 0)

    def _validate(self, engine: Engine, num_done: int, journal: Journal) -> bool:
        """Whether it came to its end."""
        assert self.validator is not None
        metrics = self.validator.evaluate(engine)
        if metrics:
            journal.evaluated(num_done, metrics)
        return metrics is not None

    def _ground(self, engine: Engine, num_done: int, journal: Journal) -> bool:
        """Whether it came to its end."""
        assert self.grounding is not None
        model = engine.module.model

        def export(path: Path, facts: dict) -> Path:
            return export_model(path, model, self.context.files, self.context.config, facts)

        metrics = self.grounding.evaluate(model, num_done, export)
        if metrics:
            journal.evaluated(num_done, metrics)
        return metrics is not None


def _grounding(context: RunContext) -> GroundingEvaluator | None:
    """None when eval.grounding_every_steps is 0."""
    config = context.config
    if not config.eval.grounding_every_steps:
        return None
    return GroundingEvaluator.build(
        config.eval,
        config.data,
        context.prompter(),
        context.ranks,
        context.folder,
        seed=config.run.seed,
        go_on=config.checkpoint.on_error == "continue",
        is_stopped=lambda: context.is_asked_to_stop,
    )
