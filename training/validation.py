"""Held-out loss: every record of data.eval_sources once, over all ranks, with the training's own packs and loss."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from training.config import Config
from training.data.loader import PackLoader
from training.engine import Ranks
from training.feed import Feed, build_feed
from training.model import ModelFiles


class Validator:
    """Evaluates the mean cross-entropy per supervised token and the token accuracy on held-out records."""

    def __init__(self, config: Config, feed: Feed, files: ModelFiles, ranks: Ranks):
        self.ranks = ranks
        # Made once: its worker processes stay for the next validation.
        self.loader = PackLoader.build_eval(config, feed, files, ranks)

    @classmethod
    def build(cls, config: Config, files: ModelFiles, ranks: Ranks, folder: Path) -> Validator | None:
        """None when the recipe has no data.eval_sources."""
        if not config.data.eval_sources:
            return None
        return cls(
            config, build_feed(config, config.data.eval_sources, files, ranks, folder, shuffle=False), files, ranks
        )

    @torch.no_grad()
    def evaluate(self, engine) -> dict[str, float]:
        """Sums over all ranks divided by the global count; dropout off; ranks need no equal number of packs."""
        was_training = engine.module.training
        engine.eval()
        sums = torch.zeros(3, dtype=torch.float64, device=self.ranks.device)
        for batch in self.loader:
            if batch.is_dummy:
                continue
            loss = engine(batch.pack.to(self.ranks.device))
            sums += torch.stack(
                [loss.ce, loss.num_correct, torch.full_like(loss.ce, batch.pack.num_supervised)]
            ).double()
        dist.all_reduce(sums)
        engine.train(was_training)
        ce, num_correct, num_supervised = sums.tolist()
        return {"eval_loss": ce / num_supervised, "eval_token_accuracy": num_correct / num_supervised}
