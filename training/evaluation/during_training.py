"""Grounding accuracy inside a training run: every n steps on held-out records with boxes, the best model kept."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pixelprune.files import write_whole
from pixelprune.prompter import Prompter
from pixelprune.records.objects import ObjectStyle
from pixelprune.settings import PruneSettings
from training.config.settings import EvalSettings
from training.data.settings import DataSettings
from training.distributed.ranks import Ranks
from training.errors import UserError, side_write
from training.evaluation.answering import AnswerSettings, Task, predict, read_tasks
from training.evaluation.prediction_sheet import draw_sheet
from training.evaluation.scoring import Prediction, summarise, to_row
from training.tracking.tracker import sheet_path

logger = logging.getLogger(__name__)

BEST_FOLDER, STATE_FILE = "best", "grounding.json"
NUM_DRAWN = 8
"""Misses, and as many hits, on the picture of an evaluation."""


class GroundingEvaluator:
    """Answers a fixed sample of data.eval_sources, split over ranks, and remembers which step was best.

    Predictions of every evaluation are kept in runs/NAME/grounding/, the state in grounding.json.
    """

    def __init__(
        self,
        settings: EvalSettings,
        prompters: dict[str, Prompter],
        ranks: Ranks,
        folder: Path,
        tasks: list[Task],
        is_stopped: Callable[[], bool],
        *,
        go_on: bool = False,
    ):
        """prompters: suffix of the metrics' names -> how the question is asked. go_on: whether training outlives
        results that the disk does not take (checkpoint.on_error=continue)."""
        self.go_on = go_on
        self.settings, self.prompters, self.ranks, self.folder = settings, prompters, ranks, folder
        self.tasks, self.is_stopped = tasks, is_stopped
        self.answers = AnswerSettings(settings.grounding_max_new_tokens, "auto", settings.grounding_batch_size)
        self.state: dict[str, Any] = {"best_step": None, "best_accuracy": None, "evaluated_steps": []}

    @classmethod
    def build(
        cls,
        settings: EvalSettings,
        data: DataSettings,
        prompter: Prompter,
        ranks: Ranks,
        folder: Path,
        *,
        seed: int,
        is_stopped: Callable[[], bool] = lambda: False,
        go_on: bool = False,
    ) -> GroundingEvaluator:
        """prompter: asks as the model is trained. seed: of the sample of records. is_stopped: asked in between.

        Raises UserError when no source has records with boxes.
        """
        style = ObjectStyle(data.answer_format, data.grounding_tokens)
        tasks, refused = read_tasks(
            data.eval_sources, ignore_keys=data.ignore_keys, index_dir=data.index_dir, object_style=style
        )
        if not tasks:
            reason = next(iter(refused.values()), "there are no data.eval_sources")
            raise UserError(f"eval.grounding_every_steps: no record can be answered: {reason}")
        if refused and ranks.is_first:
            logger.warning("grounding leaves out %d records, the first: %s", len(refused), next(iter(refused.items())))
        wanted = settings.grounding_samples
        if 0 < wanted < len(tasks):
            chosen = np.random.default_rng(seed).choice(len(tasks), wanted, replace=False)
            tasks = [tasks[i] for i in sorted(chosen.tolist())]
        prompters = {"": prompter}
        if settings.grounding_on_full and prompter.prune.strategy != "none":
            prompters["_full"] = dataclasses.replace(prompter, prune=PruneSettings("none"))
        return cls(settings, prompters, ranks, folder, tasks, is_stopped, go_on=go_on)

    def restore(self, step: int) -> None:
        """Read what an earlier start of the run found, unless the run begins anew."""
        path = self.folder / STATE_FILE
        if step and path.exists():
            self.state = json.loads(path.read_text())
            # Steps behind the restored one will be made again.
            self.state["evaluated_steps"] = [done for done in self.state["evaluated_steps"] if done <= step]
        self.ranks.barrier()  # nobody writes the state before all have read it

    def is_due(self, step: int, num_steps: int) -> bool:
        """Whether to evaluate after `step` steps: every n, and after the last; once each."""
        every = self.settings.grounding_every_steps
        return step > 0 and (step % every == 0 or step == num_steps) and step not in self.state["evaluated_steps"]

    def evaluate(self, model: Any, step: int, export: Callable[[Path, dict], Any]) -> dict[str, float] | None:
        """Metrics over all ranks; the model's mode is as before afterwards. The first rank exports a new best.

        export: writes the model to a folder with facts for its card. Every rank calls this.
        None, on all ranks and with nothing remembered, when one of them was asked to stop meanwhile.
        """
        metrics: dict[str, float] = {}
        was_training = model.training
        model.eval()
        try:
            for suffix, prompter in self.prompters.items():
                predictions = self._predictions(model, prompter)
                if predictions is None:
                    return None
                metrics |= _metrics(predictions, suffix)
                if self.ranks.is_first:
                    with side_write("answers of the evaluation", go_on=self.go_on):
                        self._keep(predictions, f"step-{step:08d}{suffix}.jsonl")
                        if not suffix:
                            pairs = list(zip(self.tasks, predictions, strict=True))
                            draw_sheet(pairs, sheet_path(self.folder, step), prompter.resize, per_verdict=NUM_DRAWN)
        finally:
            model.train(was_training)
        self.state["evaluated_steps"].append(step)
        best, accuracy = self.state["best_accuracy"], metrics["eval_accuracy"]
        if best is None or accuracy > best:
            self.state |= {"best_step": step, "best_accuracy": accuracy}
            if self.ranks.is_first:
                with side_write("the best model", go_on=self.go_on):
                    export(self.folder / BEST_FOLDER, {"optimizer steps": step, "held-out accuracy": f"{accuracy:.4f}"})
        if self.ranks.is_first:
            with side_write("what the evaluation found", go_on=self.go_on):
                write_whole(self.folder / STATE_FILE, (json.dumps(self.state, indent=2) + "\n").encode())
        return metrics

    def _predictions(self, model: Any, prompter: Prompter) -> list[Prediction] | None:
        mine = self.tasks[self.ranks.rank :: self.ranks.world_size]
        rows: list[dict] = []
        with torch.random.fork_rng(devices=[]):  # answers are greedy; whatever draws numbers leaves training's alone
            for batch in predict(model, prompter, mine, self.answers):
                rows += [to_row(one) for one in batch]
                if self.is_stopped():
                    break
        gathered = self.ranks.gather(rows)
        if sum(map(len, gathered)) < len(self.tasks):
            return None
        by_id = {row["id"]: Prediction.from_dict(row) for part in gathered for row in part}
        return [by_id[task.id] for task in self.tasks]

    def _keep(self, predictions: list[Prediction], name: str) -> None:
        (self.folder / "grounding").mkdir(exist_ok=True)
        lines = "".join(json.dumps(to_row(prediction)) + "\n" for prediction in predictions)
        write_whole(self.folder / "grounding" / name, lines.encode())


def _metrics(predictions: list[Prediction], suffix: str) -> dict[str, float]:
    result = summarise(predictions)
    overall = result["overall"]["all"]
    metrics = {
        f"eval_accuracy{suffix}": overall["accuracy"],
        f"eval_unparsed_share{suffix}": overall["num_unparsed"] / overall["num"],
        f"eval_failed_share{suffix}": overall["num_failed"] / overall["num"],
    }
    for element, score in result["element"].items():
        metrics[f"eval_accuracy_{element}{suffix}"] = score["accuracy"]
    if overall["retain_ratio"] is not None:
        metrics[f"eval_retain_ratio{suffix}"] = overall["retain_ratio"]
    return metrics
