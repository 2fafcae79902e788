"""The training loss: values and gradients, dtypes, empty packs, ranks, settings and errors."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from omegaconf.errors import ValidationError
from torch import Tensor

from tests.training.loss_reference import Case, D, V, reference
from training.loss.divergence import DIVERGENCES, DivergenceName
from training.loss.supervised import LossSettings, LossSums, supervised_loss


@pytest.mark.parametrize("num", [1, 11])
@pytest.mark.parametrize("chunk_size", [1, 4, 11, 64])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("weights", [(1.0, 0.7), (0.0, 1.3), (0.4, 0.0)], ids=str)
def test_values_and_gradients_equal_the_reference(
    weights: tuple[float, float], divergence: DivergenceName, temperature: float, chunk_size: int, num: int
) -> None:
    case = Case(num)
    settings = LossSettings(*weights, temperature, divergence, jsd_beta=0.3, chunk_size=chunk_size)
    expected, actual = reference(case, settings), case.loss(settings)
    if settings.kd_weight == 0:
        zero = torch.zeros((), dtype=torch.float64)
        expected = expected._replace(kl=zero, num_agree=zero, teacher_entropy=zero)
    torch.testing.assert_close(tuple(actual), tuple(expected), rtol=1e-12, atol=1e-12)
    for got, want in zip(case.grads(actual.total * 0.37), case.grads(expected.total * 0.37), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("temperatures", [(1.0, 0.5), (2.0, 0.7)], ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_temperature_of_the_teacher_alone(divergence: DivergenceName, temperatures: tuple[float, float]) -> None:
    case, (mine, other) = Case(11), temperatures
    settings = LossSettings(0.6, 1.3, mine, divergence, 0.3, chunk_size=4, teacher_temperature=other)
    expected, actual = reference(case, settings), case.loss(settings)
    torch.testing.assert_close(tuple(actual), tuple(expected), rtol=1e-12, atol=1e-12)
    for got, want in zip(case.grads(actual.total), case.grads(expected.total), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)
    same = dataclasses.replace(settings, teacher_temperature=0.0)
    explicit = dataclasses.replace(settings, teacher_temperature=mine)
    assert all(torch.equal(a, b) for a, b in zip(case.loss(same), case.loss(explicit), strict=True))


@pytest.mark.parametrize("chunk_size", [1, 4, 64])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("terms", [(1.0, 0.0), (0.6, 0.7), (0.0, 1.3)], ids=str)
def test_weights_of_positions_scale_the_loss_and_not_the_counts(
    terms: tuple[float, float], divergence: DivergenceName, chunk_size: int
) -> None:
    case = Case(11)
    weights = torch.tensor([1.0, 0.5, 0.25, 3.0, 1e-4, 0.1, 2.0, 0.7, 1.0, 1e4, 0.3])
    settings = LossSettings(*terms, 1.7, divergence, jsd_beta=0.3, chunk_size=chunk_size)
    expected, actual = reference(case, settings, weights), case.loss(settings, weights)
    if settings.kd_weight == 0:
        zero = torch.zeros((), dtype=torch.float64)
        expected = expected._replace(kl=zero, num_agree=zero, teacher_entropy=zero)
    torch.testing.assert_close(tuple(actual), tuple(expected), rtol=1e-12, atol=1e-12)
    for got, want in zip(case.grads(actual.total), case.grads(expected.total), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-10)
    assert actual.num_correct == case.loss(settings).num_correct


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_of_1_are_no_weights_bit_for_bit(dtype: torch.dtype) -> None:
    case, settings = Case(30, dtype), LossSettings(ce_weight=0.7, chunk_size=8)
    plain, weighted = case.loss(settings), case.loss(settings, torch.ones(30))
    assert all(torch.equal(a, b) for a, b in zip(plain, weighted, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(case.grads(plain.total), case.grads(weighted.total), strict=True))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("chunk_size", [2, 8])
def test_gradcheck(divergence: DivergenceName, chunk_size: int) -> None:
    case = Case(5)
    settings = LossSettings(0.5, 1.5, 1.7, divergence, 0.4, chunk_size)

    def total(hidden: Tensor, _: Tensor) -> Tensor:  # gradcheck perturbs the head's own weight in place
        case.hidden = hidden
        return case.loss(settings).total

    assert torch.autograd.gradcheck(total, (case.hidden, case.head.weight))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("chunk_size", [3, 64])
def test_bfloat16_inputs_keep_float32_statistics(divergence: DivergenceName, chunk_size: int) -> None:
    case = Case(40, torch.bfloat16)
    settings = LossSettings(1.0, 0.5, 2.0, divergence, chunk_size=chunk_size)
    expected, actual = reference(case, settings), case.loss(settings)
    assert {value.dtype for value in actual} == {torch.float32}
    assert {value.shape for value in actual} == {torch.Size([])}
    # Only the logits are rounded to bfloat16 (8 bits): independent errors of 2^-9 * |z| per position, |z| < 10.
    for name in ("total", "ce", "kl", "teacher_entropy"):
        torch.testing.assert_close(getattr(actual, name).double(), getattr(expected, name), rtol=4e-3, atol=0)
    for got, want in zip(case.grads(actual.total), case.grads(expected.total), strict=True):
        assert got.dtype == torch.bfloat16
        assert (got.double() - want.double()).norm() < 6e-3 * want.double().norm()


def test_statistics_are_float32_exact_given_bfloat16_logits() -> None:
    # Logits that bfloat16 holds exactly, far above its resolution of 1: softmax in bfloat16 would be off by percents.
    case = Case(6, torch.bfloat16)
    case.hidden = torch.eye(6, D).mul(100).bfloat16().requires_grad_()
    case.head.weight.data.copy_((case.head.weight * 8).round() / 8)
    expected, actual = reference(case, LossSettings()), case.loss(LossSettings())
    torch.testing.assert_close(actual.ce.double(), expected.ce, rtol=1e-6, atol=0)


def test_no_positions_give_zeros_that_reach_every_parameter() -> None:
    case = Case(0)
    for settings in (LossSettings(), LossSettings(kd_weight=1.0)):
        sums = case.loss(settings)
        assert [value.item() for value in sums] == [0.0] * 6
        hidden_grad, weight_grad = case.grads(sums.total)
        assert hidden_grad.shape == (0, D)
        assert weight_grad.shape == (V, D)
        assert weight_grad.count_nonzero() == 0


def test_uneven_parts_over_the_global_count_equal_the_whole() -> None:
    whole = Case(13)
    settings = LossSettings(0.8, 1.2, 1.5, chunk_size=4)
    sums = whole.loss(settings)
    expected = whole.grads(sums.total / 13)
    parts, weight_grad, hidden_grads = [], torch.zeros_like(expected[1]), []
    for rows in (slice(0, 1), slice(1, 9), slice(9, 9), slice(9, 13)):  # four ranks, one of them without a pack
        part = Case(13)
        part.hidden = part.hidden.detach()[rows].requires_grad_()
        part.labels, part.teacher_hidden = part.labels[rows], part.teacher_hidden[rows]
        parts.append(part.loss(settings))
        grads = part.grads(parts[-1].total / 13)
        hidden_grads.append(grads[0])
        weight_grad += grads[1]
    for name in LossSums._fields:
        torch.testing.assert_close(sum(getattr(part, name) for part in parts), getattr(sums, name))
    torch.testing.assert_close(torch.cat(hidden_grads), expected[0])
    torch.testing.assert_close(weight_grad, expected[1])


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_teacher_equal_to_student_has_nothing_to_teach(divergence: DivergenceName, temperature: float) -> None:
    case = Case(50, torch.float32, vocab=997)
    settings = LossSettings(0.0, 1.0, temperature, divergence, chunk_size=16)
    sums = case.loss(settings, teacher_hidden=case.hidden.detach(), teacher_head=case.head)
    assert abs(sums.kl.item()) / 50 < 1e-6
    assert sums.num_agree.item() == 50
    for grad in case.grads(sums.total):
        assert grad.abs().max() < 1e-5
    largest_case = case.loss(settings)  # the same with another teacher: the test above can fail
    assert largest_case.kl.item() / 50 > 1e-2


class Forbidden(torch.nn.Module):
    def forward(self, hidden: Tensor) -> Tensor:
        raise AssertionError("the teacher was evaluated")


def test_kd_weight_0_is_cross_entropy_bit_for_bit_and_asks_no_teacher() -> None:
    plain, distilling = Case(30, torch.bfloat16), Case(30, torch.bfloat16)
    ce = supervised_loss(plain.hidden, plain.head, plain.labels, LossSettings(chunk_size=8))
    settings = LossSettings(1.0, 0.0, 2.0, "jsd", 0.1, chunk_size=8)
    kd = distilling.loss(settings, teacher_hidden=distilling.teacher_hidden, teacher_head=Forbidden())
    assert all(torch.equal(a, b) for a, b in zip(ce, kd, strict=True))
    assert (kd.kl.item(), kd.num_agree.item(), kd.teacher_entropy.item()) == (0, 0, 0)
    assert all(torch.equal(a, b) for a, b in zip(plain.grads(ce.total), distilling.grads(kd.total), strict=True))


def test_cached_hidden_states_give_the_online_loss_bit_for_bit() -> None:
    case = Case(20, torch.bfloat16)
    settings = LossSettings(kd_weight=1.0, chunk_size=8)
    online = case.loss(settings)
    cached = case.loss(settings, teacher_hidden=case.teacher_hidden.float(), teacher_head=case.teacher_head)
    assert all(torch.equal(a, b) for a, b in zip(online, cached, strict=True))


def test_without_gradients_the_sums_are_the_same() -> None:
    case = Case(9)
    settings = LossSettings(kd_weight=1.0, chunk_size=4)
    with torch.no_grad():
        evaluated = case.loss(settings)
    trained = case.loss(settings)
    assert trained.total.requires_grad
    assert not any(value.requires_grad for value in (*evaluated, *trained[1:]))
    assert all(torch.equal(a, b) for a, b in zip(evaluated, trained, strict=True))


def test_the_teacher_receives_no_gradient() -> None:
    case = Case(9)
    case.teacher_head.requires_grad_(True)
    case.teacher_hidden.requires_grad_(True)
    case.loss(LossSettings(kd_weight=1.0)).total.backward()
    assert case.teacher_head.weight.grad is None
    assert case.teacher_hidden.grad is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ce_weight": -1.0}, "ce_weight must be a finite number >= 0, got -1.0"),
        ({"kd_weight": math.nan}, "kd_weight must be a finite number"),
        ({"ce_weight": 0.0}, "nothing to train on"),
        ({"temperature": 0.0}, "temperature must be a finite number > 0"),
        ({"divergence": "kl"}, "divergence must be one of forward_kl, reverse_kl, jsd, got 'kl'"),
        ({"jsd_beta": 1.0}, "use divergence=forward_kl or divergence=reverse_kl"),
        ({"chunk_size": 0}, "chunk_size must be at least 1"),
    ],
)
def test_impossible_settings_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LossSettings(**change)


def test_settings_come_from_a_structured_config() -> None:
    schema = OmegaConf.structured(LossSettings)
    merged = OmegaConf.merge(schema, OmegaConf.from_dotlist(["kd_weight=0.5", "divergence=jsd", "chunk_size=64"]))
    assert OmegaConf.to_object(merged) == LossSettings(kd_weight=0.5, divergence="jsd", chunk_size=64)
    with pytest.raises(ValidationError):
        OmegaConf.merge(schema, {"divergence": "forward-kl"})
    with pytest.raises(ValueError, match="nothing to train on"):
        OmegaConf.to_object(OmegaConf.merge(schema, {"ce_weight": 0.0}))


def test_shapes_and_teachers_that_do_not_belong_together_are_refused() -> None:
    case = Case(4)
    settings = LossSettings(kd_weight=1.0)
    top_k = (torch.zeros(4, 2), torch.zeros(4, 2, dtype=torch.int64))

    def refused(message: str, **teacher: object) -> None:
        with pytest.raises(ValueError, match=message):
            supervised_loss(case.hidden, case.head, case.labels, settings, **teacher)  # type: ignore[arg-type]

    refused("exactly one of teacher_hidden and teacher_topk, got neither")
    refused("got both", teacher_hidden=case.teacher_hidden, teacher_topk=top_k)
    refused("needs teacher_head", teacher_hidden=case.teacher_hidden)
    refused(r"teacher_hidden must be \(4, D\)", teacher_hidden=case.teacher_hidden[:3], teacher_head=case.teacher_head)
    refused(r"both \(4, k\)", teacher_topk=(top_k[0][:3], top_k[1][:3]))
    refused("leaves no remainder", teacher_topk=(torch.zeros(4, V), torch.zeros(4, V, dtype=torch.int64)))
    other = Case(4, vocab=V + 1)
    refused("need the same vocabulary", teacher_hidden=other.teacher_hidden, teacher_head=other.teacher_head)
    with pytest.raises(ValueError, match="expected one weight per label"):
        case.loss(LossSettings(), torch.ones(3))
    with pytest.raises(ValueError, match=r"expected hidden \(N, D\) and labels \(N,\)"):
        supervised_loss(case.hidden, case.head, case.labels[:3], LossSettings())
