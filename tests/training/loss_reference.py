"""Random loss problems, and their solution in plain float64 written from the definitions."""

from typing import Any

import torch
from torch import Tensor, nn

from training.loss.supervised import LossSettings, LossSums, supervised_loss

D, D_TEACHER, V = 7, 5, 23


class Case:
    """Random hidden states, heads and labels of N positions."""

    def __init__(self, num: int, dtype: torch.dtype = torch.float64, vocab: int = V, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        self.hidden = randn(num, D).requires_grad_()
        self.head = make_head(randn(vocab, D))
        self.labels = torch.randint(vocab, (num,), generator=generator)
        self.teacher_hidden = randn(num, D_TEACHER)
        self.teacher_head = make_head(randn(vocab, D_TEACHER)).requires_grad_(False)

    def loss(self, settings: LossSettings, weights: Tensor | None = None, **teacher: Any) -> LossSums:
        teacher = teacher or {"teacher_hidden": self.teacher_hidden, "teacher_head": self.teacher_head}
        return supervised_loss(self.hidden, self.head, self.labels, settings, weights=weights, **teacher)

    def grads(self, total: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(total, [self.hidden, self.head.weight])


def make_head(weight: Tensor) -> nn.Linear:
    head = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    head.weight.data.copy_(weight)
    return head


def reference_divergence(name: str, p: Tensor, q: Tensor, beta: float) -> Tensor:
    """Rows of probabilities -> (N,), straight from the definitions of the KL and of GKD's generalized JSD."""

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * torch.log(a / b)).sum(-1)

    mixture = beta * p + (1 - beta) * q
    return {
        "forward_kl": kl(p, q),
        "reverse_kl": kl(q, p),
        "jsd": beta * kl(p, mixture) + (1 - beta) * kl(q, mixture),
    }[name]


def reference(case: Case, settings: LossSettings, weights: Tensor | None = None) -> LossSums:
    """All logits at once, in float64, differentiated by autograd."""
    z = case.hidden.double() @ case.head.weight.double().T
    teacher_z = case.teacher_hidden.double() @ case.teacher_head.weight.double().T
    rows = torch.arange(len(case.labels))
    weights = torch.ones(len(rows)) if weights is None else weights
    ce = -(weights * torch.log(torch.softmax(z, -1)[rows, case.labels])).sum()
    teacher_temperature = settings.teacher_temperature or settings.temperature
    p, q = torch.softmax(teacher_z / teacher_temperature, -1), torch.softmax(z / settings.temperature, -1)
    kl = (weights * reference_divergence(settings.divergence, p, q, settings.jsd_beta)).sum()
    return LossSums(
        total=settings.ce_weight * ce + settings.kd_weight * settings.temperature**2 * kl,
        ce=ce,
        kl=kl,
        num_agree=(z.argmax(-1) == teacher_z.argmax(-1)).sum().double(),
        teacher_entropy=-(p * torch.log(p)).sum(),
        num_correct=(z.argmax(-1) == case.labels).sum().double(),
    )
