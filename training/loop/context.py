"""What all parts of a run stand on: its recipe, its ranks, its folder, the model's files and a request to stop.

For this folder alone: what lies below it takes the sections of the recipe that it needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pixelprune.model_folder import ModelFolder
from pixelprune.prompter import Prompter
from training.config.settings import Config
from training.distributed.ranks import Ranks
from training.distributed.stopping import StopRequest


@dataclass(frozen=True)
class RunContext:
    """One run on this rank.

    folder: where its quarantine, checkpoints and metrics lie. stop: None for work that a signal ends on the spot.
    """

    config: Config
    ranks: Ranks
    folder: Path
    files: ModelFolder
    stop: StopRequest | None = None

    @property
    def is_asked_to_stop(self) -> bool:
        """Whether this rank was."""
        return self.stop is not None and self.stop.is_asked

    def prompter(self) -> Prompter:
        """What asks the model as it is trained. Raises ValueError as `Prompter.load`."""
        config = self.config
        return Prompter.load(
            self.files.path,
            prune=config.pruning,
            resize=config.resize,
            grounding_tokens=config.data.grounding_tokens,
            trust_remote_code=config.model.trust_remote_code,
        )

    def is_stopping(self) -> bool:
        """Whether any rank was asked to stop. Every rank calls this."""
        return self.ranks.any(self.is_asked_to_stop)
