"""The k most probable tokens of a teacher: what a cache keeps in place of hidden states; an online one may say it too.

N = supervised tokens, D = the teacher's width, k = kd.top_k
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from training.errors import UserError
from training.loss.divergence import tempered_log_softmax
from training.loss.supervised import LossSettings


@dataclass(frozen=True)
class TopK:
    """k, and the settings of the loss that says at which temperature, and how many positions have logits at a time."""

    k: int
    loss: LossSettings

    @torch.no_grad()
    def of(self, hidden: torch.Tensor, head: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        """Final hidden states (N, D) -> log-probabilities (N, k) in float32 and their token ids (N, k) in int32.

        Raises UserError where k leaves nothing of the vocabulary.
        """
        chunks = [self._of_chunk(rows, head) for rows in hidden.split(self.loss.chunk_size)]
        return torch.cat([log_probs for log_probs, _ in chunks]), torch.cat([ids for _, ids in chunks])

    def _of_chunk(self, hidden: torch.Tensor, head: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        log_probs = tempered_log_softmax(head(hidden), self.loss.temperature_of_teacher)
        if self.k >= log_probs.shape[1]:
            raise UserError(f"kd.top_k: expected fewer than the vocabulary's {log_probs.shape[1]}, got {self.k}")
        values, ids = log_probs.topk(self.k, dim=-1)
        return values.float(), ids.int()
