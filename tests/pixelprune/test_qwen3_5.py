"""Qwen3.5 and the families with experts: the equalities that hold for Qwen3-VL, with borders in every kind of layer.

On CUDA with flash-linear-attention and causal-conv1d the same tests run packed rows through the compiled kernels, in
bfloat16 (their delta rule takes no float32).
"""

from __future__ import annotations

import copy
import logging
import sys
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForImageTextToText, AutoTokenizer
from transformers.models.qwen3_5 import modeling_qwen3_5

from pixelprune import model_call
from pixelprune.conversation import Conversation
from pixelprune.family import FAMILIES, family_of
from pixelprune.hf import generate, prepare
from pixelprune.images.image import prune_pixels
from pixelprune.model_call import KERNEL_PACKAGES, final_hidden, group_by_length, takes_packed_rows
from pixelprune.pack import VisionGeometry, model_inputs, pack_samples
from pixelprune.prompter import Prompter
from pixelprune.sample import Sample
from pixelprune.settings import PruneSettings
from tests.conftest import screen
from tests.kernels import needs_plain_layers
from tests.pixelprune.generation_reference import (
    NUM_NEW,
    SMALL,
    decode_uncached,
    logits_from_the_start,
    logits_of,
    user,
)
from tests.pixelprune.reference import PLACEHOLDER, brute_force_logits, make_sample, stock_inputs

HYBRIDS = [name for name, family in FAMILIES.items() if family.linear_attention]
NEW_FAMILIES = [name for name in FAMILIES if name != "qwen3_vl"]  # which test_pack.py covers

CASES = {
    "one image": ([screen(3, 5)], "Where is Save?", "(512, 87)"),
    "two images": ([screen(4, 3, 1), screen(2, 7, 2)], "Compare them.", "The second is wider."),
    "text only": ([], "What is 2 + 2?", "4"),
}


def no_kernels_reason() -> str:
    """Why compiled kernels cannot be tested here; empty when they can."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    missing = [package for module, package in KERNEL_PACKAGES.items() if not model_call._has_kernel(module)]
    return f"{' and '.join(missing)} not installed" if missing else ""


NEEDS_KERNELS = (pytest.mark.cuda, pytest.mark.skipif(bool(no_kernels_reason()), reason=no_kernels_reason()))
DEVICES = ["cpu", pytest.param("cuda", marks=NEEDS_KERNELS)]


@dataclass(frozen=True)
class Toy:
    """A toy model whose delta nets remember: with the usual initialisation their state fades within a few tokens."""

    model: Any
    tokenizer: Any
    geometry: VisionGeometry
    folder: str

    @property
    def device(self) -> torch.device:
        return self.model.device

    def sample(self, case: str, strategy: str = "pred2d") -> Sample:
        return make_sample(self.tokenizer, *CASES[case], strategy, case)

    def pack(self, samples: list[Sample]):
        return pack_samples(samples, self.geometry).to(self.device)

    def logits(self, samples: list[Sample], model: Any = None) -> torch.Tensor:
        """Through the packed row, as training and evaluation do."""
        model = model or self.model
        return model.lm_head(final_hidden(model, self.pack(samples), self.geometry))

    def logits_apart(self, samples: list[Sample], model: Any = None) -> torch.Tensor:
        """Every sample in a plain stock call of its own, one row without borders or padding."""
        model = model or self.model
        return torch.cat([model(**self.plain_inputs([sample])).logits[0] for sample in samples])

    def plain_inputs(self, samples: list[Sample]) -> dict:
        inputs = model_inputs(self.pack(samples), self.geometry, self.model.dtype)
        return {n: v for n, v in inputs.items() if n != "seq_idx" and not n.startswith(("cu_seq", "max_length"))}

    def assert_close(self, got: torch.Tensor, expected: torch.Tensor) -> None:
        """1e-5 in float32; kernels compute in bfloat16, where only the size of the difference can be bounded."""
        if self.model.dtype == torch.float32:
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
        else:
            assert (got - expected).float().norm() < 0.02 * expected.float().norm()


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    from training.composition.toy import build_toy_model

    root = tmp_path_factory.mktemp("families")
    return {name: str(build_toy_model(root / name, family=name)) for name in NEW_FAMILIES}


def build_toy(family: str, folders: dict[str, str], device: str) -> Toy:
    folder = folders[family]
    if device == "cpu":
        needs_plain_layers(family)
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):
                parameter.fill_(np.log(0.05))
            elif parameter.ndim > 1 and "embed_tokens" not in name:
                parameter.mul_(2)
    model = model.to(device, torch.float32 if device == "cpu" else torch.bfloat16)
    geometry = VisionGeometry.from_config(model.config)
    return Toy(model, AutoTokenizer.from_pretrained(folder), geometry, folder)


@pytest.fixture(scope="module", params=DEVICES)
def device(request) -> str:
    return request.param


@pytest.fixture(scope="module", params=NEW_FAMILIES)
def toy(request, device, folders) -> Toy:
    return build_toy(request.param, folders, device)


@pytest.fixture(scope="module")
def hybrid(device, folders) -> Toy:
    return build_toy("qwen3_5", folders, device)


@pytest.fixture(scope="module")
def cpu_hybrid(folders) -> Toy:
    return build_toy("qwen3_5", folders, "cpu")


def one_token_sample() -> Sample:
    return Sample(np.array([65]), np.zeros((3, 1), dtype=np.int64), np.array([False]), [], 1, "one token")


def uneven(toy: Toy) -> list[Sample]:
    """Three samples of uneven length, one of them one token long."""
    return [toy.sample("two images"), one_token_sample(), toy.sample("one image")]


def very_uneven(toy: Toy) -> list[Sample]:
    """Lengths that no single padded batch would hold without waste, images in every group."""
    long = make_sample(toy.tokenizer, [screen(3, 4, 5)], "Read.", "A long answer with many words. " * 20, name="long")
    return [toy.sample("one image"), long, one_token_sample(), toy.sample("two images"), long, toy.sample("text only")]


# --- equalities ---


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_keep_all_is_the_stock_call(case, toy):
    inputs = {name: value.to(toy.device) for name, value in stock_inputs(toy.tokenizer, *CASES[case]).items()}
    stock = toy.model(**inputs, use_cache=False).logits[0]
    ours = toy.logits([toy.sample(case, "none")])
    if toy.device.type == "cpu":
        assert torch.equal(ours, stock)
    toy.assert_close(ours, stock)


@pytest.mark.parametrize("case", ["one image", "two images"])
@torch.no_grad()
def test_pruned_is_gathering_after_the_patch_embedding(case, toy):
    if toy.device.type != "cpu":
        pytest.skip("the reference runs on the CPU, where installed kernels cannot")
    sample = toy.sample(case)
    assert sum(i.selection.num_kept for i in sample.images) < sum(i.selection.num_blocks for i in sample.images)
    images, question, answer = CASES[case]
    expected = brute_force_logits(toy.model, toy.tokenizer, images, sample.images, question, answer)
    toy.assert_close(toy.logits([sample]), expected)


@pytest.mark.parametrize("samples_of", [uneven, very_uneven])
@torch.no_grad()
def test_packed_samples_have_the_logits_of_samples_apart(samples_of, toy):
    samples = samples_of(toy)
    toy.assert_close(toy.logits(samples), toy.logits_apart(samples))


@torch.no_grad()
def test_one_call_for_all_lengths_gives_the_same(hybrid):
    """Ranks that share a teacher's layers must run it equally often."""
    calls = []
    handle = hybrid.model.model.language_model.register_forward_hook(lambda *_: calls.append(1))
    samples = very_uneven(hybrid)
    hidden = final_hidden(hybrid.model, hybrid.pack(samples), hybrid.geometry, in_one_call=True)
    handle.remove()
    assert len(calls) == 1
    hybrid.assert_close(hybrid.model.lm_head(hidden), hybrid.logits_apart(samples))


@torch.no_grad()
def test_a_row_without_borders_leaks_so_the_comparison_can_fail(hybrid):
    samples = uneven(hybrid)
    leaking = hybrid.model(**hybrid.plain_inputs(samples)).logits[0]
    difference = leaking - hybrid.logits_apart(samples)
    first = slice(0, len(samples[0]))
    assert difference[first].abs().max() < 0.05, "nothing stands in front of the first sample"
    assert difference.abs().max() > 0.3


@pytest.mark.parametrize("mode", ["eval", "train", "train, recomputed"])
@torch.no_grad()
def test_a_change_in_one_sample_leaves_the_others_as_they_were(mode, toy):
    """To the bit, but for experts: tokens of all samples share their products, whose rounding follows from how many
    rows they have, and on some processors shows in the last bits."""
    model = copy.deepcopy(toy.model).train(mode != "eval")
    if "recomputed" in mode:
        model.model.language_model.activation_checkpointing_enable({"use_reentrant": False})
    before = make_sample(toy.tokenizer, [screen(3, 4, 9)], "Where is Save?", "(1, 2)")
    after = make_sample(toy.tokenizer, [screen(3, 4, 9) ^ 255], "Where is Save?", "(3, 4)")
    assert len(before) == len(after)
    mine = toy.sample("one image")
    cut = slice(len(before), len(before) + len(mine))
    first = toy.logits([before, mine, before], model)[cut]
    second = toy.logits([after, mine, after], model)[cut]
    if family_of(model.config).experts and toy.model.dtype == torch.float32:
        torch.testing.assert_close(first, second, atol=1e-6, rtol=1e-6)
    else:
        assert torch.equal(first, second)


@torch.no_grad()
def test_the_vision_tower_runs_once_per_pack(toy):
    calls = []
    handle = toy.model.model.visual.register_forward_hook(lambda *_: calls.append(1))
    samples = very_uneven(toy)
    toy.logits(samples)
    handle.remove()
    assert len(calls) == 1
    assert len(group_by_length([len(sample) for sample in samples])) > 1


# --- padded batches ---


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=40))
def test_groups_hold_every_sample_once_and_never_double_the_row(lengths):
    groups = group_by_length(lengths)
    assert sorted(sample for group in groups for sample in group) == list(range(len(lengths)))
    assert all(group == sorted(group) for group in groups)
    for group in groups:
        longest = max(lengths[sample] for sample in group)
        in_chunks = [-(-lengths[sample] // 64) * 64 for sample in group]
        assert len(group) * (-(-longest // 64) * 64) <= 2 * sum(in_chunks)
    assert len(groups) <= 1 + np.log2(-(-max(lengths) // 64)) + 1


def test_equal_samples_share_one_batch():
    assert group_by_length([700, 700, 680, 690]) == [[0, 1, 2, 3]]
    assert group_by_length([1, 60, 64, 5]) == [[0, 1, 2, 3]], "below one chunk, length costs nothing"


# --- compiled kernels ---


def test_stock_layers_refuse_borders_without_kernels(cpu_hybrid):
    """Should a release take them in its plain implementation, the padded batches may go."""
    inputs = model_inputs(cpu_hybrid.pack(uneven(cpu_hybrid)), cpu_hybrid.geometry, torch.float32)
    with pytest.raises(ValueError, match="packed sequences"):
        cpu_hybrid.model(**inputs)


@torch.no_grad()
def test_borders_reach_kernels_as_they_document_them(cpu_hybrid, monkeypatch):
    """The packed row as CUDA machines run it, with stand-ins that hold the kernels to their documented arguments and
    compute every sample by itself."""
    samples = uneven(cpu_hybrid)
    lengths = [len(sample) for sample in samples]
    borders = [0, *np.cumsum(lengths).tolist()]
    plain_rule, plain_conv = modeling_qwen3_5.torch_chunk_gated_delta_rule, modeling_qwen3_5.causal_conv1d_fn
    seen = set()

    def rule(query, key, value, *, g, beta, cu_seqlens, **kwargs):
        assert query.shape[0] == 1, "rows of several batches take no borders"
        assert cu_seqlens.tolist() == borders
        seen.add("delta rule")
        known = {name: kwargs[name] for name in ("output_final_state", "use_qk_l2norm_in_kernel")}
        parts = [
            plain_rule(*(x[:, a:b] for x in (query, key, value)), g=g[:, a:b], beta=beta[:, a:b], **known)[0]
            for a, b in pairwise(borders)
        ]
        return torch.cat(parts, dim=1), None

    def conv(hidden, weight, bias=None, activation=None, *, seq_idx, **kwargs):
        assert seq_idx.dtype == torch.int32
        assert seq_idx.tolist() == [np.repeat(range(len(lengths)), lengths).tolist()]
        assert hidden.stride(1) == 1, "seq_idx is supported for channels last"
        seen.add("convolution")
        parts = [plain_conv(hidden[:, :, a:b], weight, bias, activation=activation) for a, b in pairwise(borders)]
        return torch.cat(parts, dim=2)

    apart = cpu_hybrid.logits_apart(samples)
    monkeypatch.setattr(modeling_qwen3_5, "torch_chunk_gated_delta_rule", rule)
    monkeypatch.setattr(modeling_qwen3_5, "causal_conv1d_fn", conv)
    monkeypatch.setattr(model_call, "takes_packed_rows", lambda model: True)
    cpu_hybrid.assert_close(cpu_hybrid.logits(samples), apart)
    assert seen == {"delta rule", "convolution"}


@pytest.mark.parametrize(
    ("device_type", "installed", "expected", "said"),
    [
        ("cuda", {"fla", "causal_conv1d"}, True, "kernels take the borders"),
        ("cuda", {"fla"}, False, "without causal-conv1d"),
        ("cuda", set(), False, "without flash-linear-attention and causal-conv1d"),
        ("cpu", {"fla", "causal_conv1d"}, False, "on cpu"),
    ],
)
def test_the_way_of_packing_follows_from_what_is_installed_and_is_said_once(
    device_type, installed, expected, said, monkeypatch, caplog
):
    @dataclass
    class Stub:
        config: Any
        device: torch.device = torch.device(device_type)  # noqa: RUF009

    @dataclass
    class Config:
        model_type: str

    model_call._kernels_take_borders.cache_clear()
    monkeypatch.setattr(model_call, "_has_kernel", installed.__contains__)
    with caplog.at_level(logging.INFO, logger="pixelprune.model_call"):
        for _ in range(3):
            assert takes_packed_rows(Stub(Config("qwen3_5"))) is expected
        assert takes_packed_rows(Stub(Config("qwen3_vl")))
    model_call._kernels_take_borders.cache_clear()
    assert len(caplog.records) == 1
    assert said in caplog.text


# --- generation ---

CONVERSATIONS = [
    user("Where is Save?", screen(4, 7)),
    user("What is 2 + 2?"),
    user("Compare them, please.", screen(4, 3, 1), screen(2, 7, 2)),
]


@pytest.fixture(scope="module", params=NEW_FAMILIES)
def speaker(request, folders) -> tuple[Any, Prompter]:
    """A model whose greedy answers depend on the prompt and do not stop early."""
    model = build_toy(request.param, folders, "cpu").model
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embed_tokens" not in name:
                parameter.mul_(1.5)
    model.generation_config.eos_token_id = None
    return model, Prompter.load(folders[request.param], resize=SMALL)


@pytest.mark.parametrize("batch", [[2], [0, 1, 2]], ids=str)
def test_generate_equals_uncached_step_by_step_decoding(batch, speaker):
    """One prompt at a time, and left-padded in a batch: padding must not enter the recurrent state."""
    model, prompter = speaker
    messages = [CONVERSATIONS[number] for number in batch]
    inputs = prepare(prompter, messages)
    generation = generate(model, inputs, max_new_tokens=NUM_NEW, output_logits=True)
    for row, (conversation, sample) in enumerate(zip(messages, inputs.samples, strict=True)):
        keeps = [image.selection.keep for image in sample.images]
        tokens, logits = decode_uncached(model, prompter.tokenizer, conversation, keeps, NUM_NEW)
        assert len(set(tokens)) > 2, "a constant answer compares nothing"
        assert generation.token_ids[row] == tokens
        torch.testing.assert_close(logits_of(generation, row), logits, atol=1e-4, rtol=1e-4)


def test_a_second_turn_continues_the_recurrent_state(speaker):
    """Cached turns give what an uncached pass over the whole conversation gives."""
    model, prompter = speaker
    talk = Conversation(model, prompter)
    ids: list[int] = []
    images: list[np.ndarray] = []
    for question, image in (("Where is Save?", screen(4, 7)), ("And here?", screen(3, 5, 2))):
        closing = "<|im_end|>\n" if images else ""
        assert bool(talk.num_cached_tokens) == bool(images)
        answer = talk.ask([{"type": "image", "image": image}, question], max_new_tokens=NUM_NEW, output_logits=True)
        turn = f"{closing}<|im_start|>user\n{PLACEHOLDER}{question}<|im_end|>\n<|im_start|>assistant\n"
        ids += prompter.tokenizer(turn, add_special_tokens=False)["input_ids"] + answer.token_ids[0]
        images.append(image)
        keeps = [prune_pixels(picture, PruneSettings(), picture.shape[:2]).selection.keep for picture in images]
        expected = logits_from_the_start(model, prompter.tokenizer, ids, images, keeps)[-NUM_NEW - 1 : -1]
        assert expected.argmax(-1).tolist() == answer.token_ids[0]
        torch.testing.assert_close(logits_of(answer), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("content", "found", "said"),
    [
        ("def causal_conv1d_fn(x, weight, bias=None, seq_idx=None): ...", True, ""),
        ("def causal_conv1d_fn(x, weight, bias=None): ...", False, "its causal_conv1d_fn takes no seq_idx"),
        ("", False, "does not load: module 'causal_conv1d' has no attribute 'causal_conv1d_fn'"),
        ("raise ImportError('undefined symbol')", False, "does not load: undefined symbol"),
    ],
)
def test_a_kernel_is_what_takes_borders_not_a_folder_of_its_name(content, found, said, tmp_path, monkeypatch, caplog):
    (tmp_path / "causal_conv1d").mkdir()
    (tmp_path / "causal_conv1d" / "__init__.py").write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "causal_conv1d", raising=False)
    assert model_call._has_kernel("causal_conv1d") is found
    monkeypatch.delitem(sys.modules, "causal_conv1d", raising=False)
    assert said in caplog.text
    assert bool(caplog.text) == bool(said)
