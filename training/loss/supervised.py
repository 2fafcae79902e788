"""The training loss: cross-entropy and distillation, as sums over supervised positions.

    N = supervised positions of a pack, C = positions of a chunk, D = model width, V = vocabulary, k = top-k entries

A position may carry a weight, which multiplies its terms of the loss; counts of tokens stay counts.

The divergences and their gradients are in `training.loss.divergence`, the chunks over positions in
`training.loss.chunked_head`. This file puts them together.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from training.loss.chunked_head import chunked_head_loss
from training.loss.divergence import (
    DIVERGENCES,
    Distilled,
    DivergenceName,
    distil_full,
    distil_top_k,
    tempered_log_softmax,
)


@dataclass
class LossSettings:
    """loss = ce_weight * CE + kd_weight * T^2 * D(teacher, student), each a weighted sum over supervised positions."""

    ce_weight: float = 1.0
    """Weight of the cross-entropy with the labels; 0 with kd_weight > 0 is pure distillation."""

    kd_weight: float = 0.0
    """Weight of the distillation term; at 0 no teacher is needed and none is evaluated."""

    temperature: float = 1.0
    """T: both distributions are softmax(logits / T) in the distillation term; T^2 keeps its gradient's scale."""

    divergence: DivergenceName = "forward_kl"
    """forward_kl = KL(teacher || student), reverse_kl = KL(student || teacher), or jsd (see jsd_beta)."""

    jsd_beta: float = 0.5
    """Weight of the teacher in the mixture of the generalized JSD; near 0 it acts like forward, near 1 like reverse."""

    chunk_size: int = 1024
    """Supervised positions whose logits exist at one time; changes memory and speed, not the loss."""

    teacher_temperature: float = 0.0
    """Another temperature for the teacher's distribution alone: below T it is learnt sharper than it is, towards 0 as
    labels are; 0 = loss.temperature."""

    def __post_init__(self) -> None:
        """Raises ValueError for a setting that cannot be trained with."""
        for name in ("ce_weight", "kd_weight"):
            weight = getattr(self, name)
            if not (math.isfinite(weight) and weight >= 0):
                raise ValueError(f"{name} must be a finite number >= 0, got {weight}")
        if self.ce_weight == 0 and self.kd_weight == 0:
            raise ValueError("ce_weight and kd_weight are both 0: nothing to train on; set at least one above 0")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"temperature must be a finite number > 0, got {self.temperature}")
        if not (math.isfinite(self.teacher_temperature) and self.teacher_temperature >= 0):
            raise ValueError(
                f"teacher_temperature must be a finite number >= 0 (0 = temperature), got {self.teacher_temperature}"
            )
        if self.divergence not in DIVERGENCES:
            raise ValueError(f"divergence must be one of {', '.join(DIVERGENCES)}, got {self.divergence!r}")
        if not 0 < self.jsd_beta < 1:
            raise ValueError(
                f"jsd_beta must lie strictly between 0 and 1, got {self.jsd_beta}; "
                "for the ends use divergence=forward_kl or divergence=reverse_kl"
            )
        if self.chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1 position, got {self.chunk_size}")

    @property
    def temperature_of_teacher(self) -> float:
        """Of the distribution that is learnt."""
        return self.teacher_temperature or self.temperature


class LossSums(NamedTuple):
    """Sums over supervised positions, 0-dim float32 tensors on the device; only `total` carries a gradient.

    The four fields that need a teacher are 0 when kd_weight is 0.
    """

    total: Tensor
    """ce_weight * ce + kd_weight * T^2 * kl: divide by the global sum of weights, multiply by the world size."""
    ce: Tensor
    """Cross-entropy with the labels, in nats, weighted."""
    kl: Tensor
    """The chosen divergence at the temperatures in nats, weighted by position, without kd_weight and T^2."""
    num_agree: Tensor
    """Positions where the student's most probable token is the teacher's (one of them, where several tie)."""
    teacher_entropy: Tensor
    """Entropy in nats of the teacher's distribution at its temperature (with a top-k teacher, a lower bound)."""
    num_correct: Tensor
    """Positions where the student's most probable token is the label."""


def supervised_loss(
    hidden: Tensor,
    lm_head: nn.Module,
    labels: Tensor,
    settings: LossSettings,
    *,
    weights: Tensor | None = None,
    labelled: Tensor | None = None,
    teacher_hidden: Tensor | None = None,
    teacher_head: nn.Module | None = None,
    teacher_topk: tuple[Tensor, Tensor] | None = None,
) -> LossSums:
    """Loss of the student's final hidden states at supervised positions, without a host synchronisation.

    Args:
        hidden: (N, D) final hidden states at the N positions that predict a supervised token. N may be 0: the sums
            are 0 and still connected to `hidden` and the head, so that every rank touches the same parameters.
        lm_head: the output head, (C, D) -> (C, V): plain, tied, frozen or LoRA-wrapped. Each of its parameters that
            require gradients receives one, zeros where the head does not use it.
        labels: (N,) int64, the supervised token ids, all within the vocabulary (no ignore index).
        settings: weights of the two terms, divergence, temperature and chunk size.
        weights: (N,) float32, what the loss of each position is multiplied with; None where all are 1.
        labelled: (N,) bool, False where the token is no label but the student's own: nothing of it counts as
            cross-entropy, nor as correct. None where all are labels.
        teacher_hidden: (N, D_teacher) the teacher's final hidden states at the same tokens; cast to the dtype of
            teacher_head where they differ.
        teacher_head: the teacher's output head, to the same vocabulary; no gradient reaches it.
        teacher_topk: in place of hidden states, (log_probs (N, k), ids (N, k)) with k < V, log-probabilities taken
            at settings.temperature_of_teacher. Merging all other tokens into one outcome bounds the divergence from
            below: see `training.loss.divergence.distil_top_k`.

    Raises:
        ValueError: shapes that do not belong together, or kd_weight > 0 without exactly one teacher.
    """
    _check_student(hidden, labels, weights)
    teacher = None
    if settings.kd_weight > 0:
        teacher = _make_teacher(hidden.shape[0], settings, teacher_hidden, teacher_head, teacher_topk)

    def loss_of_logits(rows: slice, logits: Tensor, wants_grad: bool) -> tuple[Tensor, Tensor | None]:
        by_position = (None if values is None else values[rows] for values in (weights, labelled))
        return _chunk_loss(rows, logits, labels[rows], teacher, settings, wants_grad, *by_position)

    num_sums = len(LossSums._fields)
    total, reported = chunked_head_loss(hidden, lm_head, loss_of_logits, num_sums, settings.chunk_size)
    return LossSums(total, *reported.unbind())


class _FullTeacher(NamedTuple):
    hidden: Tensor  # (N, D_teacher)
    head: nn.Module

    def distil(
        self, rows: slice, student: Tensor, top1: Tensor, settings: LossSettings, q_weight: float | Tensor = 0.0
    ) -> Distilled:
        weight = next(self.head.parameters(), None)
        hidden = self.hidden[rows].to(self.hidden.dtype if weight is None else weight.dtype)
        with torch.no_grad():
            teacher_logits = self.head(hidden)
        if teacher_logits.shape != student.shape:
            raise ValueError(
                f"teacher_head gives logits {tuple(teacher_logits.shape)}, lm_head gives {tuple(student.shape)}: "
                "teacher and student need the same vocabulary; choose a teacher of the same family"
            )
        temperature = settings.temperature_of_teacher
        return distil_full(student, teacher_logits, top1, settings.divergence, temperature, settings.jsd_beta, q_weight)


class _TopKTeacher(NamedTuple):
    log_probs: Tensor  # (N, k)
    ids: Tensor  # (N, k)

    def distil(
        self, rows: slice, student: Tensor, top1: Tensor, settings: LossSettings, q_weight: float | Tensor = 0.0
    ) -> Distilled:
        if self.ids.shape[1] >= student.shape[1]:
            raise ValueError(
                f"teacher_topk holds k = {self.ids.shape[1]} entries, which leaves no remainder in a vocabulary of "
                f"{student.shape[1]}; use fewer entries or teacher_hidden"
            )
        log_probs, ids = self.log_probs[rows], self.ids[rows].long()
        return distil_top_k(student, log_probs, ids, top1, settings.divergence, settings.jsd_beta, q_weight)


def _chunk_loss(
    rows: slice,
    logits: Tensor,
    labels: Tensor,
    teacher: _FullTeacher | _TopKTeacher | None,
    settings: LossSettings,
    wants_grad: bool,
    weights: Tensor | None,
    labelled: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Sums (6,) in the order of LossSums, and the gradient (C, V) of their total in the dtype of the logits.

    At T = 1 both terms have one softmax, and one tensor takes both gradients. Otherwise the distillation is done
    before the cross-entropy makes its own, so that its temporaries are gone.
    """
    columns = labels.unsqueeze(-1)
    top1 = logits.argmax(-1)
    shares_softmax = teacher is not None and settings.temperature == 1
    distilled = None
    if teacher is not None and not shares_softmax:
        distilled = teacher.distil(rows, tempered_log_softmax(logits, settings.temperature), top1, settings)
    log_q = tempered_log_softmax(logits, 1.0)  # (C, V) float32
    by_row = None if weights is None else weights.to(log_q.dtype).unsqueeze(-1)  # (C, 1)
    is_label = None if labelled is None else labelled.to(log_q.dtype).unsqueeze(-1)
    ce_by_row = _product(by_row, is_label)
    log_p = log_q.gather(-1, columns)
    ce = -(log_p if ce_by_row is None else log_p * ce_by_row).sum()
    total, kl, num_agree, entropy = settings.ce_weight * ce, ce.new_zeros(()), ce.new_zeros(()), ce.new_zeros(())
    kd_scale = settings.kd_weight * settings.temperature
    if shares_softmax:
        assert teacher is not None
        ce_share = settings.ce_weight / kd_scale
        q_weight = ce_share if is_label is None else ce_share * is_label
        distilled = teacher.distil(rows, log_q, top1, settings, q_weight)
    if distilled is not None:
        kl = (distilled.divergence if by_row is None else distilled.divergence * by_row.squeeze(-1)).sum()
        num_agree = distilled.agrees.sum()
        entropy = distilled.teacher_entropy.sum()
        total = total + kd_scale * settings.temperature * kl
    is_correct = top1 == labels
    num_correct = (is_correct if labelled is None else is_correct & labelled).sum()
    sums = torch.stack([value.to(ce.dtype) for value in (total, ce, kl, num_agree, entropy, num_correct)])
    if not wants_grad:
        return sums, None
    if shares_softmax:
        assert distilled is not None
        grad = _scaled(distilled.grad, kd_scale, by_row)  # d/dlogits = d/du / T
        if settings.ce_weight > 0:
            ce_scale = settings.ce_weight if ce_by_row is None else settings.ce_weight * ce_by_row
            grad.scatter_(-1, columns, grad.gather(-1, columns) - ce_scale)
    elif settings.ce_weight > 0:
        grad = log_q.exp_()  # softmax - one-hot
        grad = _scaled(grad.scatter_(-1, columns, grad.gather(-1, columns) - 1), settings.ce_weight, ce_by_row)
        if distilled is not None:
            grad.add_(_scaled(distilled.grad, 1, by_row), alpha=kd_scale)
    else:
        assert distilled is not None, "LossSettings refuses ce_weight = kd_weight = 0"
        grad = _scaled(distilled.grad, kd_scale, by_row)
    return sums, grad.to(logits.dtype)


def _product(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """Of two factors by row, None for ones."""
    if one is None or other is None:
        return other if one is None else one
    return one * other


def _scaled(grad: Tensor, scale: float, by_row: Tensor | None) -> Tensor:
    """grad * scale * by_row in place; no pass over it where that is 1."""
    if by_row is not None:
        return grad.mul_(scale * by_row)
    return grad if scale == 1 else grad.mul_(scale)


def _check_student(hidden: Tensor, labels: Tensor, weights: Tensor | None) -> None:
    if hidden.ndim != 2 or labels.shape != hidden.shape[:1]:
        raise ValueError(
            f"expected hidden (N, D) and labels (N,) at the same supervised positions, "
            f"got {tuple(hidden.shape)} and {tuple(labels.shape)}"
        )
    if weights is not None and weights.shape != labels.shape:
        raise ValueError(f"expected one weight per label, ({len(labels)},), got {tuple(weights.shape)}")


def _make_teacher(
    num_positions: int,
    settings: LossSettings,
    hidden: Tensor | None,
    head: nn.Module | None,
    topk: tuple[Tensor, Tensor] | None,
) -> _FullTeacher | _TopKTeacher:
    if (hidden is None) == (topk is None):
        raise ValueError(
            f"kd_weight = {settings.kd_weight} needs exactly one of teacher_hidden and teacher_topk, "
            f"got {'neither' if hidden is None else 'both'}; set kd_weight=0 to train without a teacher"
        )
    if topk is not None:
        log_probs, ids = topk
        if log_probs.ndim != 2 or log_probs.shape != ids.shape or log_probs.shape[0] != num_positions:
            raise ValueError(
                f"teacher_topk must be (log_probs, ids), both ({num_positions}, k) as there are {num_positions} "
                f"supervised positions, got {tuple(log_probs.shape)} and {tuple(ids.shape)}"
            )
        return _TopKTeacher(log_probs.detach(), ids)
    assert hidden is not None
    if head is None:
        raise ValueError("teacher_hidden needs teacher_head, the output head that turns it into logits")
    if hidden.ndim != 2 or hidden.shape[0] != num_positions:
        raise ValueError(
            f"teacher_hidden must be ({num_positions}, D) as there are {num_positions} supervised positions, "
            f"got {tuple(hidden.shape)}"
        )
    return _FullTeacher(hidden.detach(), head)
