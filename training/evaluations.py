"""What a run is measured by while it trains: held-out loss, and grounding answers that keep the best model."""

from __future__ import annotations

from pathlib import Path

from training.config import Config
from training.engine import Ranks
from training.export import export_model
from training.grounding_eval import GroundingEvaluator
from training.journal import Journal
from training.model import ModelFiles
from training.stopping import Agreement
from training.validation import Validator


class Evaluations:
    """Runs what is due after a step; every rank calls it, the journal writes it down."""

    def __init__(self, config: Config, files: ModelFiles, ranks: Ranks, folder: Path, num_steps: int):
        """Indexes the held-out records. Raises UserError for what is wrong with them."""
        self.config, self.files, self.num_steps = config, files, num_steps
        self.validator = Validator.build(config, files, ranks, folder)
        self.grounding = GroundingEvaluator.build(config, files, ranks, folder)

    def catch_up(self, engine, num_done: int, journal: Journal, agreement: Agreement) -> None:
        """At a start: what is due before the first step, or was as the run stopped between save and evaluation."""
        if self._validation_is_due(num_done) and not agreement.any(journal.has_evaluation(num_done))[0]:
            self._validate(engine, num_done, journal)
        if self.grounding:
            self.grounding.restore(num_done)
            self._ground(engine, num_done, journal)

    def after(self, engine, num_done: int, journal: Journal) -> None:
        """After `num_done` steps."""
        if self._validation_is_due(num_done):
            self._validate(engine, num_done, journal)
        self._ground(engine, num_done, journal)

    def _validation_is_due(self, num_done: int) -> bool:
        if not self.validator:
            return False
        if num_done == 0:
            return self.config.eval.at_start
        every = self.config.eval.every_steps
        return num_done == self.num_steps or (every > 0 and num_done % every == 0)

    def _validate(self, engine, num_done: int, journal: Journal) -> None:
        assert self.validator is not None
        journal.evaluated(num_done, self.validator.evaluate(engine))

    def _ground(self, engine, num_done: int, journal: Journal) -> None:
        if self.grounding and self.grounding.is_due(num_done, self.num_steps):
            model = engine.module.model

            def export(path: Path, facts: dict) -> Path:
                return export_model(path, model, self.files, self.config, facts)

            journal.evaluated(num_done, self.grounding.evaluate(model, num_done, export))
