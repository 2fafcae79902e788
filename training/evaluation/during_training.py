"""Grounding accuracy inside a training run: every n steps on held-out records with boxes, the best model kept."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from pixelprune.files import write_whole
from pixelprune.model_folder import ModelFolder
from pixelprune.prompter import Prompter
from pixelprune.settings import PruneSettings
from training.config.settings import Config
from training.distributed.engine import Ranks
from training.distributed.stopping import StopRequest
from training.errors import UserError
from training.evaluation.answering import AnswerSettings, Task, predict, read_tasks
from training.evaluation.scoring import Prediction, summarise, to_row

logger = logging.getLogger(__name__)

BEST_FOLDER, STATE_FILE = "best", "grounding.json"


class GroundingEvaluator:
    """Answers a fixed sample of data.eval_sources, split over ranks, and remembers which step was best.

    Predictions of every evaluation are kept in runs/NAME/grounding/, the state in grounding.json.
    """

    def __init__(
        self, config: Config, files: ModelFolder, ranks: Ranks, folder: Path, tasks: list[Task], stop: StopRequest
    ):
        self.config, self.ranks, self.folder, self.tasks, self.stop = config, ranks, folder, tasks, stop
        settings = config.eval
        self.answers = AnswerSettings(settings.grounding_max_new_tokens, "auto", settings.grounding_batch_size)
        prunes = {"": config.prune}
        if settings.grounding_on_full and config.prune.strategy != "none":
            prunes["_full"] = PruneSettings("none")
        self.prompters = {
            suffix: Prompter.load(
                files.path, prune=prune, resize=config.resize, trust_remote_code=config.model.trust_remote_code
            )
            for suffix, prune in prunes.items()
        }
        self.state: dict[str, Any] = {"best_step": None, "best_accuracy": None, "evaluated_steps": []}

    @classmethod
    def build(
        cls, config: Config, files: ModelFolder, ranks: Ranks, folder: Path, stop: StopRequest
    ) -> GroundingEvaluator | None:
        """None when eval.grounding_every_steps is 0. Raises UserError when no eval source has records with boxes."""
        if not config.eval.grounding_every_steps:
            return None
        tasks, refused = read_tasks(config.data.eval_sources, ignore_keys=config.data.ignore_keys)
        if not tasks:
            reason = next(iter(refused.values()), "there are no data.eval_sources")
            raise UserError(f"eval.grounding_every_steps: no record can be answered: {reason}")
        if refused and ranks.is_first:
            logger.warning("grounding leaves out %d records, the first: %s", len(refused), next(iter(refused.items())))
        wanted = config.eval.grounding_samples
        if 0 < wanted < len(tasks):
            chosen = np.random.default_rng(config.run.seed).choice(len(tasks), wanted, replace=False)
            tasks = [tasks[i] for i in sorted(chosen.tolist())]
        return cls(config, files, ranks, folder, tasks, stop)

    def restore(self, step: int) -> None:
        """Read what an earlier start of the run found, unless the run begins anew."""
        path = self.folder / STATE_FILE
        if step and path.exists():
            self.state = json.loads(path.read_text())
            # Steps behind the restored one will be made again.
            self.state["evaluated_steps"] = [done for done in self.state["evaluated_steps"] if done <= step]
        dist.barrier()  # nobody writes the state before all have read it

    def is_due(self, step: int, num_steps: int) -> bool:
        """Whether to evaluate after `step` steps: every n, and after the last; once each."""
        every = self.config.eval.grounding_every_steps
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
                    self._keep(predictions, f"step-{step:08d}{suffix}.jsonl")
        finally:
            model.train(was_training)
        self.state["evaluated_steps"].append(step)
        best, accuracy = self.state["best_accuracy"], metrics["eval_accuracy"]
        if best is None or accuracy > best:
            self.state |= {"best_step": step, "best_accuracy": accuracy}
            if self.ranks.is_first:
                export(self.folder / BEST_FOLDER, {"optimizer steps": step, "held-out accuracy": f"{accuracy:.4f}"})
        if self.ranks.is_first:
            write_whole(self.folder / STATE_FILE, (json.dumps(self.state, indent=2) + "\n").encode())
        return metrics

    def _predictions(self, model: Any, prompter: Prompter) -> list[Prediction] | None:
        mine = self.tasks[self.ranks.rank :: self.ranks.world_size]
        rows: list[dict] = []
        with torch.random.fork_rng(devices=[]):  # answers are greedy; whatever draws numbers leaves training's alone
            for batch in predict(model, prompter, mine, self.answers):
                rows += [to_row(one) for one in batch]
                if self.stop.is_asked:
                    break
        gathered: list[list[dict]] = [[] for _ in range(self.ranks.world_size)]
        dist.all_gather_object(gathered, rows)
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
