"""Training on shared prefixes: loss, distillation and gradients as of rows apart, whatever of the model is trained."""

from __future__ import annotations

import copy

import pytest
import torch

from pixelprune.attention.prefixes import find_groups
from pixelprune.attention.segments import use_borders
from pixelprune.pack import pack_samples, row_pictures
from tests.conftest import screen
from tests.pixelprune.reference import make_sample
from tests.pixelprune.test_borders import assert_equal_gradients
from tests.pixelprune.test_prefixes import QUESTIONS
from training.config.settings import GroupSettings, ModelSettings, OptimSettings
from training.data.distillation import DistillationPack, with_full_rows
from training.loss.supervised import LossSettings
from training.model.loading import enable_recomputation
from training.model.lora import LoraSettings, add_adapters
from training.model.parameters import freeze_parts
from training.model.supervised import SupervisedModel
from training.teacher.teachers import OnlineTeacher


def pack_of(tokenizer, geometry, pictures: list[int], share: str = "", *, decode: bool = True) -> DistillationPack:
    """Questions about each picture, interleaved, with the teacher's row beside them; share: "prefix" or "vision"."""
    wanted = [(number, texts) for texts in QUESTIONS[:4] for number in pictures]
    samples, fulls = (
        [make_sample(tokenizer, [screen(4, 5, number)], *texts, strategy=strategy) for number, texts in wanted]
        for strategy in ("pred2d", "none")
    )
    groups = find_groups(samples, geometry.image_token_id) if share == "prefix" else None
    same = row_pictures(samples) if share == "vision" else None
    pack = pack_samples(samples, geometry, groups, pictures=same)
    return with_full_rows(pack, samples, fulls, geometry, decode=decode, groups=groups, pictures=same)


def sums_and_gradients(module: SupervisedModel, pack: DistillationPack):
    module.zero_grad(set_to_none=True)
    sums = module(pack)
    sums.total.backward()
    gradients = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    return [part.item() for part in sums], gradients


@pytest.fixture
def student(toy_model):
    model = copy.deepcopy(toy_model).train()
    use_borders(model)
    return model


@pytest.mark.parametrize(
    ("share", "trained", "decode"),
    [
        ("prefix", "all", True),
        ("prefix", "language model", True),
        ("prefix", "vision tower", True),
        ("prefix", "adapters", True),
        ("vision", "all", False),
        ("vision", "adapters", True),
    ],
)
def test_distillation_on_a_shared_row_equals_rows_apart(
    student, toy_model, toy_tokenizer, geometry, share, trained, decode
):
    teacher_model = copy.deepcopy(toy_model).eval().requires_grad_(False)
    use_borders(teacher_model)
    with torch.no_grad():
        for parameter in student.parameters():  # a student that is not the teacher
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.01)
    if trained == "adapters":
        add_adapters(student, LoraSettings(rank=4, vit=True))
        for name, parameter in student.named_parameters():
            if ".lora_B" in name:  # zero at the start, which would leave A without a gradient
                torch.nn.init.normal_(parameter, std=0.02)
    elif trained != "all":
        is_vision, frozen = trained == "vision tower", GroupSettings(freeze=True)
        freeze_parts(student, OptimSettings(llm=frozen) if is_vision else OptimSettings(vit=frozen, merger=frozen))
    module = SupervisedModel(
        student,
        geometry,
        LossSettings(ce_weight=0.5, kd_weight=1.0, temperature=2.0),
        OnlineTeacher(teacher_model, teacher_model.lm_head, geometry),
    )
    apart, shared = (pack_of(toy_tokenizer, geometry, [0, 1], how, decode=decode) for how in ("", share))
    computed = "num_tokens" if share == "prefix" else "num_patches"
    assert getattr(shared, computed) < getattr(apart, computed)
    assert getattr(shared.full, computed) < getattr(apart.full, computed)
    expected_sums, expected = sums_and_gradients(module, apart)
    sums, gradients = sums_and_gradients(module, shared)
    assert sums[:2] == pytest.approx(expected_sums[:2], rel=1e-6), "total, cross-entropy"
    assert sums[2] == pytest.approx(expected_sums[2], abs=1e-5), "divergence"
    assert expected_sums[2] > 0
    assert_equal_gradients(gradients, expected)


@pytest.mark.parametrize(("vit", "llm"), [(1, 0), (0, 1), (2, 2)])
def test_whatever_is_recomputed_the_bits_are_those_of_the_shared_row_without(
    student, toy_tokenizer, geometry, vit, llm
):
    module = SupervisedModel(student, geometry, LossSettings())
    pack = pack_of(toy_tokenizer, geometry, [0, 1], "prefix")
    expected_sums, expected = sums_and_gradients(module, pack)
    enable_recomputation(student, ModelSettings(recompute_vit=vit, recompute_llm=llm))
    sums, gradients = sums_and_gradients(module, pack)
    assert sums == expected_sums
    for name, gradient in expected.items():
        assert torch.equal(gradients[name], gradient), name
