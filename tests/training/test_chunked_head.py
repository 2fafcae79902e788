"""The output head in chunks: which gradients arrive, how often, and what is alive meanwhile."""

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.training.loss_reference import Case, D, V, make_head
from training.loss.chunked_head import _scaled
from training.loss.divergence import DIVERGENCES, DivergenceName
from training.loss.supervised import LossSettings, supervised_loss

CE = LossSettings(chunk_size=4)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_gradients_are_scaled_in_float32_and_rounded_once(device) -> None:
    """A factor rounded to bfloat16 would be off by up to 0.4 %, for all weights alike."""
    grad = torch.randn(100, 8, generator=torch.Generator().manual_seed(0)).bfloat16().to(device)
    scale = torch.tensor(8 / 2041, device=device)
    assert scale.bfloat16().float() != scale
    assert torch.equal(_scaled(grad, scale, torch.bfloat16), (grad.float() * float(scale)).bfloat16())
    assert torch.equal(_scaled(grad, scale, torch.float32), grad.float() * float(scale))


def test_frozen_head_passes_the_gradient_on_and_takes_none() -> None:
    case, trained = Case(10), Case(10)
    case.head.requires_grad_(False)
    case.loss(CE).total.backward()
    trained.loss(CE).total.backward()
    assert case.head.weight.grad is None
    torch.testing.assert_close(case.hidden.grad, trained.hidden.grad, rtol=0, atol=0)


def test_frozen_backbone_trains_the_head_alone() -> None:
    case, trained = Case(10), Case(10)
    case.hidden = case.hidden.detach()
    case.loss(CE).total.backward()
    trained.loss(CE).total.backward()
    torch.testing.assert_close(case.head.weight.grad, trained.head.weight.grad, rtol=0, atol=0)


def test_nothing_to_train_carries_no_graph() -> None:
    case = Case(10)
    case.hidden = case.hidden.detach()
    case.head.requires_grad_(False)
    assert not case.loss(CE).total.requires_grad


def test_tied_head_and_embedding_share_one_gradient() -> None:
    ids, labels = torch.arange(10) % V, torch.arange(3, 13) % V
    weight = Case(1).head.weight.detach()

    def gradient(chunked: bool) -> tuple[Tensor, int]:
        embedding = nn.Embedding(V, D, _weight=weight.clone())
        head = make_head(weight)
        head.weight = embedding.weight
        num_ready = []
        embedding.weight.register_post_accumulate_grad_hook(lambda _: num_ready.append(1))
        hidden = embedding(ids).tanh()
        if chunked:
            supervised_loss(hidden, head, labels, CE).total.backward()
        else:
            cross_entropy(head(hidden), labels, reduction="sum").backward()
        assert embedding.weight.grad is not None
        return embedding.weight.grad, len(num_ready)

    actual, num_ready = gradient(chunked=True)
    torch.testing.assert_close(actual, gradient(chunked=False)[0])
    assert num_ready == 1


def test_hooks_fire_once_per_backward_and_see_the_final_gradient() -> None:
    case = Case(10)
    seen: list[Tensor] = []
    case.head.weight.register_hook(lambda grad: seen.append(grad.clone()))
    num_ready: list[int] = []
    case.head.weight.register_post_accumulate_grad_hook(lambda _: num_ready.append(1))
    sums = case.loss(CE)
    assert not seen  # nothing leaks out of the forward pass
    assert case.head.weight.grad is None
    (sums.total * 3).backward()
    assert len(seen) == len(num_ready) == 1
    torch.testing.assert_close(seen[0], case.head.weight.grad, rtol=0, atol=0)


def test_a_retained_graph_gives_the_same_gradient_again() -> None:
    case = Case(10)
    total = case.loss(CE).total
    first = torch.autograd.grad(total, case.head.weight, torch.tensor(0.25), retain_graph=True)
    second = torch.autograd.grad(total, case.head.weight, torch.tensor(0.25))
    assert torch.equal(first[0], second[0])


@pytest.mark.parametrize("chunk_size", [3, 64])
def test_lora_head(chunk_size: int) -> None:
    torch.manual_seed(0)
    case = Case(10, torch.float32)
    model = nn.ModuleDict({"lm_head": case.head})
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False), model)
    lora = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert sorted(name.split(".")[1] for name in lora) == ["lora_A", "lora_B"]
    inputs = [case.hidden, *lora.values()]
    sums = supervised_loss(case.hidden, model["lm_head"], case.labels, LossSettings(chunk_size=chunk_size))
    actual = torch.autograd.grad(sums.total, inputs)
    expected = torch.autograd.grad(cross_entropy(model["lm_head"](case.hidden), case.labels, reduction="sum"), inputs)
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_dropout_before_the_head_draws_its_mask_once() -> None:
    case = Case(10)
    head = nn.Sequential(nn.Dropout(0.5), case.head)
    torch.manual_seed(1)
    actual = case.grads(supervised_loss(case.hidden, head, case.labels, LossSettings()).total)
    torch.manual_seed(1)
    expected = case.grads(cross_entropy(head(case.hidden), case.labels, reduction="sum"))
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want)


def test_a_head_parameter_without_use_receives_zeros() -> None:
    case = Case(10)
    case.head.spare = nn.Parameter(torch.ones(3))
    case.loss(CE).total.backward()
    assert torch.equal(case.head.spare.grad, torch.zeros(3))


def test_weight_gradients_of_many_chunks_add_up_in_float32() -> None:
    case = Case(512, torch.bfloat16)
    case.labels.fill_(3)  # gradients of one sign: every addition in bfloat16 loses something
    case.hidden.data.abs_()
    (actual,) = torch.autograd.grad(case.loss(LossSettings(chunk_size=1)).total, case.head.weight)
    parts = []
    for i in range(512):  # the same chunks, each exact to its own rounding
        part = supervised_loss(case.hidden[i : i + 1], case.head, case.labels[i : i + 1], LossSettings())
        parts.append(torch.autograd.grad(part.total, case.head.weight)[0])
    in_bfloat16 = torch.zeros_like(actual)
    for part_grad in parts:
        in_bfloat16 += part_grad
    exact = torch.stack(parts).double().sum(0)
    assert (actual.double() - exact).norm() < 2**-8 * exact.norm()  # one rounding of the result
    assert (in_bfloat16.double() - exact).norm() > 2**-5 * exact.norm()


class LiveBytes(TorchDispatchMode):
    """Bytes of live storages that were made as a tensor of a counted shape; names every operator, too."""

    def __init__(self, counts: Callable[[torch.Size], bool]) -> None:
        super().__init__()
        self.counts, self.most_rows, self.peak_bytes = counts, 0, 0
        self.operators: set[str] = set()
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        self.operators.add(func.name())
        for tensor in tree_leaves(result):
            if not isinstance(tensor, Tensor) or not self.counts(tensor.shape):
                continue
            self.most_rows = max(self.most_rows, tensor.shape[0])
            storage = tensor.untyped_storage()
            if storage._cdata not in given:  # a new one, no view
                self.live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.live = {key: entry for key, entry in self.live.items() if not entry[0].expired()}
        self.peak_bytes = max(self.peak_bytes, sum(num_bytes for _, num_bytes in self.live.values()))
        return result


def vocabulary_bytes(num: int, settings: LossSettings, vocab: int = 1000) -> LiveBytes:
    case = Case(num, torch.bfloat16, vocab=vocab)
    with LiveBytes(lambda shape: shape[1:] == (vocab,) and shape[0] != D) as counted:  # logits; not heads (D, V)
        case.loss(settings).total.backward()
    return counted


@pytest.mark.parametrize("settings", [(1.0, 0.0), (0.0, 1.0), (1.0, 1.0)], ids=["ce", "kd", "both"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_logits_of_one_chunk_are_alive_whatever_the_number_of_positions(
    settings: tuple[float, float], divergence: DivergenceName
) -> None:
    loss = LossSettings(*settings, temperature=2.0, divergence=divergence, chunk_size=8)
    few, many = vocabulary_bytes(16, loss), vocabulary_bytes(256, loss)
    assert many.most_rows == 8
    assert many.peak_bytes == few.peak_bytes
    whole = vocabulary_bytes(256, LossSettings(*settings, temperature=2.0, divergence=divergence, chunk_size=256))
    assert whole.most_rows == 256  # the counter sees what it should
    assert whole.peak_bytes > 20 * many.peak_bytes
    # Per logit: bfloat16 logits, their float32 copy and its log-softmax; distilling, the teacher's as well and m.
    assert many.peak_bytes <= (10 if settings[1] == 0 else 24) * 8 * 1000


def test_nothing_of_vocabulary_size_is_saved_for_backward_but_the_head_gradient() -> None:
    case = Case(64, torch.bfloat16, vocab=1000)
    saved: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tuple(tensor.shape))
        return tensor

    total = case.loss(LossSettings(kd_weight=1.0, chunk_size=8)).total
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        total = case.loss(LossSettings(kd_weight=1.0, chunk_size=8)).total
    assert saved.count((64, D)) == 1
    assert {shape for shape in saved if 1000 in shape} <= {(1000, D), (D, 1000)}
    total.backward()


def test_the_host_reads_no_value_of_a_tensor() -> None:
    loss = LossSettings(kd_weight=1.0, temperature=2.0, chunk_size=8)
    operators = vocabulary_bytes(32, loss).operators
    assert "aten::_log_softmax" in operators  # the list is not empty
    reads = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::is_nonzero", "aten::equal"}
    assert not operators & reads


def test_two_head_gradients_are_alive_at_most() -> None:
    # Wide against the chunk, so that the head's gradients are the peak: the sum in float32 and one chunk's part.
    case = Case(12, torch.float32, vocab=1000)
    case.hidden = torch.randn(12, 64).requires_grad_()
    case.head = nn.Linear(64, 1000, bias=False)
    with LiveBytes(lambda shape: tuple(shape) == (1000, 64)) as counted:
        case.loss(LossSettings(chunk_size=2)).total.backward()
    assert counted.peak_bytes == 2 * 1000 * 64 * 4
