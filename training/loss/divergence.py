"""Divergences between a teacher's and a student's next-token distribution, with their gradients in closed form.

    C = positions of one chunk, V = vocabulary, k = entries of a top-k teacher
    T = temperature, of the student; the teacher may have one of its own
    p = softmax(teacher logits / its T), q = softmax(student logits / T), u = student logits / T

    forward_kl  KL(p || q)                                        d/du = q - p
    reverse_kl  KL(q || p)                                        d/du = q * (log q/p - KL(q || p))
    jsd         b KL(p || m) + (1-b) KL(q || m), m = bp + (1-b)q  d/du = (1-b) q * (log q/m - KL(q || m))

The JSD is the generalized one of GKD (arXiv 2306.13649, section 3.1). It vanishes at both ends of b, where
JSD / b -> KL(p || q) for b -> 0 and JSD / (1-b) -> KL(q || p) for b -> 1; hence b is kept strictly inside (0, 1).

Closed forms, rather than autograd, because a graph over (C, V) would keep every intermediate of that size alive.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

DivergenceName = Literal["forward_kl", "reverse_kl", "jsd"]
DIVERGENCES: tuple[DivergenceName, ...] = ("forward_kl", "reverse_kl", "jsd")


class Distilled(NamedTuple):
    """What one chunk of positions learns from the teacher."""

    divergence: Tensor
    """(C,) the divergence, without the T^2 factor."""
    grad: Tensor
    """(C, V) its gradient with respect to u = student logits / T, and q_weight * q where that was asked for."""
    teacher_entropy: Tensor
    """(C,) entropy in nats of the distribution distilled from, i.e. at the teacher's temperature."""
    agrees: Tensor
    """(C,) bool: the student's most probable token is the teacher's, or one of several that tie for it."""


def distil_full(
    log_q: Tensor,
    teacher_logits: Tensor,
    top1: Tensor,
    name: DivergenceName,
    teacher_temperature: float,
    beta: float,
    q_weight: float | Tensor = 0.0,
) -> Distilled:
    """Divergence from the teacher's whole distribution.

    A pass over (C, V) is what this costs beside the head: so what there is is written over, here and in `divergence`.

    Args:
        log_q: (C, V) the student's log-probabilities at its temperature, float32 or float64. Overwritten.
        teacher_logits: (C, V) in any float type. Overwritten.
        top1: (C,) the student's most probable tokens.
        q_weight: a number, or one for each position (C, 1): so much of q is added to the gradient.
    """
    best = teacher_logits.amax(-1, keepdim=True)
    agrees = (teacher_logits.gather(-1, top1.unsqueeze(-1)) == best).squeeze(-1)
    log_p = tempered_log_softmax(teacher_logits, teacher_temperature)
    p = torch.exp(log_p, out=teacher_logits) if teacher_logits.dtype == log_p.dtype else log_p.exp()
    return Distilled(*divergence(log_q, log_p, p, name, beta, q_weight), agrees)


def distil_top_k(
    log_q: Tensor,
    log_probs: Tensor,
    ids: Tensor,
    top1: Tensor,
    name: DivergenceName,
    beta: float,
    q_weight: float | Tensor = 0.0,
) -> Distilled:
    """Divergence from a teacher of which only k log-probabilities per position are known.

    The k tokens are k outcomes, all others together one more. By the data-processing inequality the divergence over
    these k + 1 outcomes is never above the full one (f-divergences cannot grow when outcomes are merged), and they
    are equal where student and teacher agree on the relative weights inside the remainder. The gradient moves the
    remainder's total mass only, in proportion to the student's own weights.

    Args:
        log_q: (C, V) the student's log-probabilities at its temperature, float32 or float64. Overwritten.
        log_probs: (C, k) teacher log-probabilities **at the teacher's temperature**, normalised over the whole
            vocabulary: the remainder at another temperature cannot be known from them. In any order.
        ids: (C, k) int64, their token ids, distinct in a row; k < V.
        top1: (C,) the student's most probable tokens.
        q_weight: as in `distil_full`.

    The entropy is that of the k + 1 outcomes, a lower bound of the full one.
    """
    top = log_q.gather(-1, ids)  # (C, k)
    rest = log_q.scatter_(-1, ids, -math.inf).exp_()
    # Summed, and not 1 less the others, which would lose the digits of a small one. Below `tiny` nothing is learnt.
    mass = rest.sum(-1, keepdim=True).clamp_(min=torch.finfo(rest.dtype).tiny)  # (C, 1)
    log_outcomes = torch.cat((top, mass.log()), -1).log_softmax(-1)  # (C, k + 1)
    log_p = _with_remainder(log_probs.to(rest.dtype))  # (C, k + 1)
    value, outcome_grad, entropy = divergence(log_outcomes, log_p, log_p.exp(), name, beta, q_weight)
    grad = rest.mul_(outcome_grad[:, -1:] / mass).scatter_(-1, ids, outcome_grad[:, :-1])
    teacher_top1 = ids.gather(-1, log_probs.argmax(-1, keepdim=True)).squeeze(-1)
    return Distilled(value, grad, entropy, teacher_top1 == top1)


def divergence(
    log_q: Tensor, log_p: Tensor, p: Tensor, name: DivergenceName, beta: float, q_weight: float | Tensor = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """(rows,) divergence, (rows, outcomes) gradient with respect to the student's logits, (rows,) entropy of p.

    log_q and log_p (rows, outcomes) are normalised log-probabilities of student and teacher, p = exp(log_p); all three
    are overwritten. q_weight as in `distil_full`.
    """
    if name == "forward_kl":
        value = log_p.sub_(log_q).mul_(p).sum(-1)
        entropy = -(torch.mul(p, log_q, out=log_p).sum(-1) + value)  # KL(p || q) = -sum p log q - H(p)
        grad = log_q.exp_() if _is_zero(q_weight) else log_q.exp_().mul_(1 + q_weight)
        return value, grad.sub_(p), entropy.clamp_(min=0)
    if name == "reverse_kl":
        entropy = -p.mul_(log_p).sum(-1)
        return *_towards(log_q, log_p, q_weight), entropy
    if name == "jsd":
        log_m = torch.mul(p, log_p)
        entropy = -log_m.sum(-1)
        torch.add(log_p, math.log(beta / (1 - beta)), out=log_m)
        torch.logaddexp(log_m, log_q, out=log_m).add_(math.log1p(-beta))
        from_teacher = log_p.sub_(log_m).mul_(p).sum(-1)
        from_student, grad = _towards(log_q, log_m, q_weight / (1 - beta))
        return beta * from_teacher + (1 - beta) * from_student, grad.mul_(1 - beta), entropy
    raise ValueError(f"unknown divergence {name!r}; expected one of {', '.join(DIVERGENCES)}")


def tempered_log_softmax(logits: Tensor, temperature: float) -> Tensor:
    """Log-softmax of logits / temperature over the last axis, in float32 (float64 where the logits are)."""
    work_dtype = torch.promote_types(logits.dtype, torch.float32)
    if temperature == 1.0:
        return logits.log_softmax(-1, dtype=work_dtype)
    return logits.to(work_dtype).div(temperature).log_softmax(-1)


def _towards(log_q: Tensor, log_r: Tensor, q_weight: float | Tensor) -> tuple[Tensor, Tensor]:
    """KL(q || r) per row, and q * (log q/r - KL(q || r) + q_weight); both distributions are overwritten.

    For r fixed this is (but for q_weight) the gradient of the KL with respect to q's logits; for r = m it is the
    gradient of the JSD but for its factor, since the terms through m cancel: b p/m + (1-b) q/m = 1.
    """
    log_ratio = torch.sub(log_q, log_r, out=log_r)
    q = log_q.exp_()
    value = (q * log_ratio).sum(-1)
    return value, q.mul_(log_ratio.sub_(value.unsqueeze(-1) - q_weight))


def _is_zero(q_weight: float | Tensor) -> bool:
    return not isinstance(q_weight, Tensor) and q_weight == 0


def _with_remainder(log_probs: Tensor) -> Tensor:
    """(C, k) log-probabilities -> (C, k + 1), the last being that of everything else, normalised.

    Rounded log-probabilities may sum to 1 or slightly above: the remainder is kept at one float epsilon at least (a
    zero would make the reverse KL infinite) and the row is normalised again.
    """
    remainder = (1 - log_probs.exp().sum(-1, keepdim=True)).clamp_(min=torch.finfo(log_probs.dtype).eps)
    return torch.cat((log_probs, remainder.log()), -1).log_softmax(-1)
