"""Held-out loss: every record of data.eval_sources once, over all ranks, with the training's own packs and loss."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from pixelprune.model_folder import ModelFolder
from training.config.settings import Config
from training.data.loader import PackLoader
from training.distributed.engine import Ranks
from training.distributed.stopping import Agreement, StopRequest
from training.loop.feed import Feed, build_feed


class Validator:
    """Evaluates the mean cross-entropy per supervised token and the token accuracy on held-out records."""

    def __init__(
        self, config: Config, feed: Feed, files: ModelFolder, ranks: Ranks, stop: StopRequest, agreement: Agreement
    ):
        self.ranks, self.stop, self.agreement = ranks, stop, agreement
        # Made once: its worker processes stay for the next validation.
        self.loader = PackLoader.build_eval(config, feed, files, ranks)

    @classmethod
    def build(
        cls, config: Config, files: ModelFolder, ranks: Ranks, folder: Path, stop: StopRequest, agreement: Agreement
    ) -> Validator | None:
        """None when the recipe has no data.eval_sources. Raises what `build_feed` raises."""
        sources = config.data.eval_sources
        if not sources:
            return None
        feed = build_feed(config, sources, files, ranks, folder, shuffle=False, stop=stop, agreement=agreement)
        return cls(config, feed, files, ranks, stop, agreement)

    @torch.no_grad()
    def evaluate(self, engine) -> dict[str, float] | None:
        """Sums over all ranks divided by the global count; dropout off; ranks need no equal number of packs.

        None, on all ranks, when one of them was asked to stop meanwhile.
        """
        was_training = engine.module.training
        engine.eval()
        sums = torch.zeros(3, dtype=torch.float64, device=self.ranks.device)
        broken_off = False
        for _, batches in self.loader.steps():
            # Decided together: the loader's steps begin with a collective call, which a rank that left would miss.
            broken_off = self.agreement.any_rank(self.stop.is_asked)
            if broken_off:
                break
            for batch in batches:
                if batch.is_dummy:
                    continue
                loss = engine(batch.pack.to(self.ranks.device))
                sums += torch.stack(
                    [loss.ce, loss.num_correct, torch.full_like(loss.ce, batch.pack.num_supervised)]
                ).double()
        engine.train(was_training)
        if broken_off:
            return None
        dist.all_reduce(sums)
        ce, num_correct, num_supervised = sums.tolist()
        return {"eval_loss": ce / num_supervised, "eval_token_accuracy": num_correct / num_supervised}
