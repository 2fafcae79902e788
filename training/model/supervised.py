"""The module that the engine runs: packed row in, loss sums out."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from pixelprune.model_call import final_hidden
from pixelprune.pack import Pack, VisionGeometry
from training.data.distillation import DistillationPack
from training.loss.supervised import LossSettings, LossSums, supervised_loss


class Teacher(Protocol):
    """What `training.teacher.teachers` builds."""

    def targets(self, pack: DistillationPack) -> dict[str, Any]:
        """The teacher's arguments of `supervised_loss` for this pack."""
        ...


class SupervisedModel(nn.Module):
    """The stock model plus the loss, as one module: the engine sees one forward per micro-step.

    The inner stock model gives final hidden states; the output head runs only at positions that predict a supervised
    token, in chunks. This equals the stock forward with `logits_to_keep` (tested) without its (N, V) logits.

    teacher: what a DistillationPack is learned from. It is no submodule: optimizer, checkpoint and export never see it.
    """

    def __init__(
        self, model: PreTrainedModel, geometry: VisionGeometry, loss: LossSettings, teacher: Teacher | None = None
    ):
        super().__init__()
        assert not isinstance(teacher, nn.Module), "a submodule's weights would be trained and saved"
        self.model = model
        self.geometry = geometry
        self.loss = loss
        self.teacher = teacher

    def forward(self, pack: Pack) -> LossSums:
        """Loss sums over the pack's supervised positions; the pack is on the model's device.

        A pack without its teacher's side gives the cross-entropy alone: what validation sends.
        """
        loss, targets, labelled = self.loss, {}, None
        if self.teacher is not None and isinstance(pack, DistillationPack):
            # Before the student's forward: the teacher's activations are gone when the student's are kept.
            targets, labelled = self.teacher.targets(pack), pack.labelled
        elif loss.kd_weight > 0:
            assert not self.training, "a training step with kd_weight > 0 needs packs with their teacher's side"
            loss = dataclasses.replace(loss, ce_weight=1.0, kd_weight=0.0)
        hidden = self.hidden_at_supervised(pack)
        weights = pack.weights if pack.is_weighted else None
        head = self.model.lm_head
        return supervised_loss(hidden, head, pack.labels, loss, weights=weights, labelled=labelled, **targets)

    def hidden_at_supervised(self, pack: Pack) -> torch.Tensor:
        """Final hidden states (N, D) at the positions whose logits predict a supervised token."""
        return final_hidden(self.model, pack, self.geometry).index_select(0, pack.logit_index)
