"""Divergences: known limits, the top-k teacher, and numerical corners."""

import math

import pytest
import torch
from torch import Tensor

from tests.training.loss_reference import Case, V, reference_divergence
from training.loss.divergence import DIVERGENCES, Distilled, DivergenceName, distil_full, distil_top_k
from training.loss.supervised import LossSettings


def logits(seed: int, rows: int = 6, vocab: int = V, scale: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(rows, vocab, generator=generator, dtype=torch.float64)


def distilled_full(student: Tensor, teacher: Tensor, name: DivergenceName, beta: float, q_weight=0.0) -> Distilled:
    log_q = torch.log_softmax(student, -1)
    return distil_full(log_q, teacher.clone(), student.argmax(-1), name, 1.0, beta, q_weight)


def distilled_top_k(
    student: Tensor, log_probs: Tensor, ids: Tensor, name: DivergenceName, temperature: float, beta: float
) -> Distilled:
    log_q = torch.log_softmax(student / temperature, -1)
    return distil_top_k(log_q, log_probs, ids, student.argmax(-1), name, beta)


def top_k_of(teacher: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor]:
    """The cache's form of a teacher: shuffled, since no order is promised."""
    values, ids = torch.log(torch.softmax(teacher / temperature, -1)).topk(k)
    order = torch.randperm(k, generator=torch.Generator().manual_seed(k))
    return values[:, order], ids[:, order]


def reference_top_k(
    student: Tensor, log_probs: Tensor, ids: Tensor, name: str, temperature: float, beta: float
) -> tuple[Tensor, Tensor]:
    """Divergence and teacher entropy over k + 1 outcomes, summing the probabilities of the others one by one."""
    q_all = torch.softmax(student / temperature, -1)
    listed = torch.zeros_like(q_all).scatter(-1, ids, 1.0).bool()
    q = torch.cat((q_all.gather(-1, ids), q_all.masked_fill(listed, 0).sum(-1, keepdim=True)), -1)
    p = torch.cat((log_probs.exp(), 1 - log_probs.exp().sum(-1, keepdim=True)), -1)
    return reference_divergence(name, p, q, beta), -(p * p.log()).sum(-1)


@pytest.mark.parametrize("beta", [1e-3, 1e-5])
def test_jsd_tends_to_the_two_kls(beta: float) -> None:
    student, teacher = logits(0, scale=0.7), logits(1, scale=0.7)

    def value_and_grad(name: DivergenceName, jsd_beta: float = 0.5) -> tuple[Tensor, Tensor]:
        return distilled_full(student, teacher, name, jsd_beta)[:2]

    # The next term of the series is of order beta * p/q, and p/q stays below 20 for logits this small.
    assert torch.exp((torch.log_softmax(student, -1) - torch.log_softmax(teacher, -1)).abs()).max() < 20
    tolerance = {"rtol": 20 * beta, "atol": 20 * beta}
    for got, want in zip(value_and_grad("jsd", beta), value_and_grad("forward_kl"), strict=True):
        torch.testing.assert_close(got / beta, want, **tolerance)
    for got, want in zip(value_and_grad("jsd", 1 - beta), value_and_grad("reverse_kl"), strict=True):
        torch.testing.assert_close(got / beta, want, **tolerance)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
@pytest.mark.parametrize("k", [1, 5, V - 1])
def test_top_k_equals_its_definition(name: DivergenceName, temperature: float, k: int) -> None:
    student, teacher = logits(2).requires_grad_(), logits(3)
    log_probs, ids = top_k_of(teacher, k, temperature)
    result = distilled_top_k(student.detach(), log_probs, ids, name, temperature, 0.3)
    value, entropy = reference_top_k(student, log_probs, ids, name, temperature, 0.3)
    torch.testing.assert_close(result.divergence, value, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(result.teacher_entropy, entropy, rtol=1e-9, atol=1e-12)
    (grad,) = torch.autograd.grad(value.sum(), student)
    torch.testing.assert_close(result.grad / temperature, grad, rtol=1e-8, atol=1e-12)
    assert torch.equal(result.agrees, student.argmax(-1) == teacher.argmax(-1))


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_share_of_the_cross_entropy_is_added_in_the_same_pass(name: DivergenceName) -> None:
    student, teacher = logits(8), logits(9)
    plain, q = distilled_full(student, teacher, name, 0.3), torch.softmax(student, -1)
    for q_weight in (0.6, torch.linspace(0, 2, 6, dtype=torch.float64).unsqueeze(-1)):
        both = distilled_full(student, teacher, name, 0.3, q_weight)
        assert torch.equal(both.divergence, plain.divergence)
        torch.testing.assert_close(both.grad, plain.grad + q_weight * q, rtol=1e-12, atol=1e-14)


def test_a_tie_of_the_teacher_agrees_with_each_of_its_tokens() -> None:
    student, teacher = torch.eye(3, V), torch.zeros(3, V)
    teacher[:, :2] = 1.0
    assert distilled_full(student, teacher, "forward_kl", 0.5).agrees.tolist() == [True, True, False]


@pytest.mark.parametrize("name", DIVERGENCES)
def test_top_k_bounds_the_full_divergence_from_below_and_grows_with_k(name: DivergenceName) -> None:
    student, teacher = logits(4, rows=200), logits(5, rows=200)
    full = distilled_full(student, teacher, name, 0.3)
    previous = torch.zeros(200, dtype=torch.float64)  # tolerance 1e-9: a small remainder, 1 - sum, has few digits
    log_probs, ids = torch.log_softmax(teacher, -1).sort(descending=True)
    for k in (1, 2, 5, 12, V - 1):
        merged = distilled_top_k(student, log_probs[:, :k], ids[:, :k], name, 1.0, 0.3)
        assert (merged.divergence >= previous - 1e-9).all()
        assert (merged.divergence <= full.divergence + 1e-9).all()
        assert (merged.teacher_entropy <= full.teacher_entropy + 1e-12).all()
        previous = merged.divergence
    # With one token in the remainder nothing is merged.
    torch.testing.assert_close(merged.divergence, full.divergence, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(merged.grad, full.grad, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(merged.teacher_entropy, full.teacher_entropy, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("chunk_size", [1, 4, 64])
@pytest.mark.parametrize("temperature", [1.0, 1.5])  # 1: both terms share a softmax and a gradient
@pytest.mark.parametrize("name", DIVERGENCES)
def test_top_k_teacher_in_the_loss(chunk_size: int, temperature: float, name: DivergenceName) -> None:
    case = Case(10)
    settings = LossSettings(0.5, 2.0, temperature, name, chunk_size=chunk_size)
    log_probs, ids = top_k_of(case.teacher_head(case.teacher_hidden).detach(), 4, temperature)
    sums = case.loss(settings, teacher_topk=(log_probs, ids.int()))
    student = case.hidden @ case.head.weight.T
    ce = -torch.log_softmax(student, -1).gather(-1, case.labels[:, None]).sum()
    kl, entropy = (value.sum() for value in reference_top_k(student, log_probs, ids, name, temperature, 0.5))
    torch.testing.assert_close(sums.kl, kl)
    torch.testing.assert_close(sums.teacher_entropy, entropy)
    total = 0.5 * ce + 2.0 * temperature**2 * kl
    torch.testing.assert_close(sums.total, total)
    for got, want in zip(case.grads(sums.total), case.grads(total), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_teacher_that_is_certain_stays_finite(name: DivergenceName) -> None:
    teacher = torch.zeros(3, V)
    teacher[:, 4] = 200.0  # the others underflow to probability 0 in float32
    student = logits(6, rows=3).float()
    log_probs, ids = torch.log_softmax(teacher, -1).topk(3)
    log_probs_of_student = torch.log_softmax(student, -1)
    results = (
        distilled_full(student, teacher, name, 0.5),
        distilled_top_k(student, log_probs, ids, name, 1.0, 0.5),
        distilled_full(teacher, student, name, 0.5),
        # A student that is certain leaves a remainder that underflows, too.
        distilled_top_k(teacher, log_probs_of_student[:, :5], torch.arange(5).expand(3, 5), name, 1.0, 0.5),
    )
    for result in results:
        assert result.divergence.isfinite().all()
        assert result.grad.isfinite().all()
        assert (result.divergence > 0).all()
    certain = -torch.log_softmax(student.double(), -1)[:, 4]  # KL(one-hot || q) = -log q
    if name == "forward_kl":
        torch.testing.assert_close(results[0].divergence.double(), certain, rtol=1e-5, atol=0)
        torch.testing.assert_close(results[1].divergence.double(), certain, rtol=1e-4, atol=0)


def test_rounded_top_k_log_probabilities_are_normalised() -> None:
    # Three tokens hold all the mass but 1e-6; in bfloat16 they sum to more than 1.
    exact = torch.tensor([[0.55, 0.3, 0.149999]], dtype=torch.float64).log()
    rounded = exact.bfloat16().float()
    assert rounded.exp().sum() > 1
    student = torch.full((1, V), -20.0)
    student[0, :3] = exact[0].float()
    result = distilled_top_k(student, rounded, torch.tensor([[0, 1, 2]]), "forward_kl", 1.0, 0.5)
    assert 0 <= result.divergence.item() < 1e-4
    assert math.isfinite(result.teacher_entropy.item())
    # The remainder counts as one float32 epsilon, which keeps the reverse KL of a spread-out student in bounds.
    reverse = distilled_top_k(torch.zeros(1, V), rounded, torch.tensor([[0, 1, 2]]), "reverse_kl", 1.0, 0.5)
    p = torch.cat((rounded[0].double().exp(), torch.tensor([torch.finfo(torch.float32).eps])))
    q = torch.tensor([1 / V, 1 / V, 1 / V, (V - 3) / V], dtype=torch.float64)
    torch.testing.assert_close(reverse.divergence[0].double(), (q * (q / (p / p.sum())).log()).sum(), rtol=1e-5, atol=0)
