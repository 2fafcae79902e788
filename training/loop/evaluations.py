"""What a run is measured by while it trains: held-out loss, and grounding answers that keep the best model."""

from __future__ import annotations

from pathlib import Path

from pixelprune.model_folder import ModelFolder
from training.checkpoint.export import export_model
from training.config.settings import Config
from training.distributed.engine import Ranks
from training.distributed.stopping import Agreement, StopRequest
from training.evaluation.during_training import GroundingEvaluator
from training.loop.held_out_loss import Validator
from training.loop.journal import Journal


class Evaluations:
    """Runs what is due after a step; every rank calls it, the journal writes it down.

    A request to stop breaks an evaluation off, on all ranks: the time that a scheduler leaves is for the checkpoint.
    The next start makes it up (`catch_up`).
    """

    def __init__(
        self,
        config: Config,
        files: ModelFolder,
        ranks: Ranks,
        folder: Path,
        num_steps: int,
        stop: StopRequest,
        agreement: Agreement,
    ):
        """Indexes the held-out records. Raises UserError for what is wrong with them, StopAskedError when stopped."""
        self.config, self.files, self.num_steps = config, files, num_steps
        self.stop, self.agreement = stop, agreement
        self.validator = Validator.build(config, files, ranks, folder, stop, agreement)
        self.grounding = GroundingEvaluator.build(config, files, ranks, folder, stop)

    def catch_up(self, engine, num_done: int, journal: Journal) -> bool:
        """At a start: what is due before the first step, or was as the run stopped between save and evaluation.

        Returns what `after` returns.
        """
        validates = self._validation_is_due(num_done) and not self.agreement.any_rank(journal.has_evaluation(num_done))
        if self.grounding:
            self.grounding.restore(num_done)
        return self._evaluate(engine, num_done, journal, validates)

    def after(self, engine, num_done: int, journal: Journal) -> bool:
        """After `num_done` steps. Whether a stop was asked for meanwhile, the same on all ranks."""
        return self._evaluate(engine, num_done, journal, self._validation_is_due(num_done))

    def _evaluate(self, engine, num_done: int, journal: Journal, validates: bool) -> bool:
        answers = bool(self.grounding and self.grounding.is_due(num_done, self.num_steps))
        if validates and not self._validate(engine, num_done, journal):
            return True
        if answers and not self._ground(engine, num_done, journal):
            return True
        return (validates or answers) and self.agreement.any_rank(self.stop.is_asked)

    def _validation_is_due(self, num_done: int) -> bool:
        if not self.validator:
            return False
        if num_done == 0:
            return self.config.eval.at_start
        every = self.config.eval.every_steps
        return num_done == self.num_steps or (every > 0 and num_done % every == 0)

    def _validate(self, engine, num_done: int, journal: Journal) -> bool:
        """Whether it came to its end."""
        assert self.validator is not None
        metrics = self.validator.evaluate(engine)
        if metrics:
            journal.evaluated(num_done, metrics)
        return metrics is not None

    def _ground(self, engine, num_done: int, journal: Journal) -> bool:
        """Whether it came to its end."""
        assert self.grounding is not None
        model = engine.module.model

        def export(path: Path, facts: dict) -> Path:
            return export_model(path, model, self.files, self.config, facts)

        metrics = self.grounding.evaluate(model, num_done, export)
        if metrics:
            journal.evaluated(num_done, metrics)
        return metrics is not None
