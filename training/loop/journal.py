"""What the first rank writes down and shows while a run goes on."""

from __future__ import annotations

from pixelprune.command import ProgressLine
from training.checkpoint.checkpointer import RunState
from training.config.recipe import config_to_dict
from training.loop.context import RunContext
from training.tracking.metrics import live_line
from training.tracking.tracker import Tracker


class Journal:
    """Metrics to their files and to the terminal; on ranks other than the first it does nothing."""

    def __init__(self, context: RunContext, num_steps: int, state: RunState):
        config = context.config
        self.log_every, self.num_steps = config.tracking.log_every, num_steps
        self.tracker: Tracker | None = None

        def open_files() -> None:
            self.progress = ProgressLine("step", num_steps, start=state.step, speaks_at_once=True)
            self.tracker = Tracker(
                context.folder,
                config.tracking,
                config.run.name,
                config_to_dict(config),
                run_id=state.tracker_id,
                restored_step=state.step,
                go_on=config.checkpoint.on_error == "continue",
            )

        context.ranks.from_first(open_files)  # all hear of a disk that is full

    def has_evaluation(self, step: int) -> bool:
        return self.tracker is not None and self.tracker.has_evaluation(step)

    def stepped(self, num_done: int, metrics: dict[str, float]) -> None:
        if self.tracker:
            if num_done % self.log_every == 0 or num_done == self.num_steps:
                self.tracker.log(num_done, metrics)
            self.progress.update(num_done, live_line(metrics))

    def evaluated(self, num_done: int, metrics: dict[str, float]) -> None:
        if self.tracker:
            self.tracker.log(num_done, metrics)
            if "eval_accuracy" in metrics:
                self.tracker.show_evaluations(num_done)
            self.progress.say(f"step {num_done}: {live_line(metrics)}")

    def close(self) -> None:
        if self.tracker:
            self.progress.close()
            self.tracker.close()
