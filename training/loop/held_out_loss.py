"""Held-out loss: every record of data.eval_sources once, over all ranks, with the training's own packs and loss."""

from __future__ import annotations

import torch

from pixelprune.command import ProgressLine
from training.data.loader import MicroBatch
from training.distributed.engine_protocol import Engine
from training.loop.context import RunContext
from training.loop.feed import Feed, build_feed, validation_loader


class Validator:
    """Evaluates the mean cross-entropy per supervised token and the token accuracy on held-out records."""

    def __init__(self, context: RunContext, feed: Feed):
        self.context = context
        # Made once: its worker processes stay for the next validation.
        self.loader = validation_loader(context, feed)

    @classmethod
    def build(cls, context: RunContext) -> Validator | None:
        """None when the recipe has no data.eval_sources. Raises what `build_feed` raises."""
        sources = context.config.data.eval_sources
        if not sources:
            return None
        feed = build_feed(context, sources, shuffle=False)
        return cls(context, feed)

    @torch.no_grad()
    def evaluate(self, engine: Engine) -> dict[str, float] | None:
        """Sums over all ranks divided by the global count; dropout off; ranks need no equal number of packs.

        None, on all ranks, when one of them was asked to stop meanwhile.
        """
        was_training = engine.module.training
        engine.eval()
        sums = torch.zeros(4, dtype=torch.float64, device=self.context.ranks.device)
        is_interrupted = False
        steps = self.loader.last_step - self.loader.first_step
        is_first = self.context.ranks.is_first
        with ProgressLine("held-out loss, step", steps, is_shown=is_first, ends_silently=True) as progress:
            for _, batches in self.loader.steps():
                # Decided together: the loader's steps begin with a collective call, which a rank that left would miss.
                is_interrupted = self.context.is_stopping()
                if is_interrupted:
                    break
                for batch in batches:
                    if not batch.is_dummy:
                        sums += self._sums(engine, batch)
                progress.advance()
        engine.train(was_training)
        if is_interrupted:
            return None
        ce, num_correct, num_supervised, loss_weight = self.context.ranks.sum(sums).tolist()
        return {"eval_loss": ce / loss_weight, "eval_token_accuracy": num_correct / num_supervised}

    def _sums(self, engine: Engine, batch: MicroBatch) -> torch.Tensor:
        """Loss, correct tokens, supervised tokens and the sum of their weights of one pack."""
        loss = engine(batch.pack.to(self.context.ranks.device))
        num_supervised = torch.full_like(loss.ce, batch.pack.num_supervised)
        weight = torch.full_like(loss.ce, batch.pack.loss_weight)
        return torch.stack([loss.ce, loss.num_correct, num_supervised, weight]).double()
