"""The student answers a share of its samples as it is now, before each optimizer step (GKD, arXiv 2306.13649)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from pixelprune.hf import PrunedInputs, generate
from pixelprune.prompter import Prompter
from training.answers.generating import Sampling, seeded
from training.config.teacher import TeacherSettings
from training.data.worker import PackResult
from training.on_policy.draft import Draft
from training.tracking.meter import StepMeter


class OwnAnswers:
    """Makes packs of the drafts that the loader's workers prepare.

    Generation is this rank's alone: ZeRO-1 and ZeRO-2 keep all weights on every rank, so nothing is waited for.
    """

    def __init__(
        self, settings: TeacherSettings, model: Any, prompter: Prompter, meter: StepMeter, *, seed: int, rank: int
    ):
        """model: as it is trained, on its device. prompter: of the student, pruned as it is trained."""
        self.model, self.prompter, self.meter, self.seed, self.rank = model, prompter, meter, seed, rank
        self.batch_size = settings.on_policy_batch_size
        self.sampling = Sampling(
            max_new_tokens=settings.on_policy_max_new_tokens, temperature=settings.on_policy_temperature
        )

    def answered(self, step: int, results: Sequence[PackResult]) -> list[PackResult]:
        """The packs of an optimizer step, with what the student answers in place of what the records say.

        step: since the start of the run. With seed and rank it decides what is drawn, so that a run that continues from
        a checkpoint draws the same.
        """
        was_training = self.model.training
        self.model.eval()
        try:
            with self.meter.timing("generate"):
                return [self._answered(result, step, number) for number, result in enumerate(results)]
        finally:
            self.model.train(was_training)

    def _answered(self, result: PackResult, step: int, number: int) -> PackResult:
        draft = result.pack
        assert isinstance(draft, Draft), "with kd.on_policy the workers leave packs to be made"
        prompts = draft.prompts()
        answers: dict[int, list[int]] = {}
        places = list(prompts)
        for start in range(0, len(places), self.batch_size):
            batch = places[start : start + self.batch_size]
            inputs = PrunedInputs([prompts[place] for place in batch], [""] * len(batch), self.prompter)
            with seeded(self.model.device, self.seed, self.rank, step, number, start):
                found = generate(self.model, inputs, **self.sampling.arguments())
            answers |= dict(zip(batch, found.token_ids, strict=True))
        pack = draft.packed(answers)
        planned_tokens = sum(sample.num_supervised for sample in draft.samples)
        planned_weight = sum(sample.loss_weight for sample in draft.samples)
        return dataclasses.replace(
            result,
            pack=pack,
            num_lost_supervised=result.num_lost_supervised + planned_tokens - pack.num_supervised,
            lost_loss_weight=result.lost_loss_weight + planned_weight - pack.loss_weight,
        )
