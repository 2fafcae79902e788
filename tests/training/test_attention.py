"""Varlen attention through the stock models: equal to sdpa, without a mask, and never without borders."""

from __future__ import annotations

import copy
import logging
import math

import numpy as np
import pytest
import torch
from transformers import masking_utils

from pixelprune.attention.borders import Borders, Segment
from pixelprune.attention.gathered import gather_keys
from pixelprune.attention.prefixes import find_groups
from pixelprune.attention.segments import mask_beside_borders
from pixelprune.model_call import final_hidden
from pixelprune.pack import Pack, VisionGeometry, model_inputs, pack_samples
from pixelprune.sample import ChatTokens, build_sample
from tests.conftest import screen
from tests.kernels import needs_plain_layers
from tests.pixelprune.reference import make_sample
from training.composition.toy import build_toy_model
from training.errors import UserError
from training.model import attention
from training.model.attention import (
    _has_varlen,
    _import_problem,
    choose_attention,
    load_pretrained,
    reference_varlen,
    use_varlen,
    varlen_attention,
)
from training.model.attention_check import LIMITS, attention_by_definition

CPU = torch.device("cpu")
GPU = pytest.param("cuda", marks=pytest.mark.cuda)


def one_token(tokenizer, name: str):
    ids = np.array([tokenizer.convert_tokens_to_ids("<|im_start|>")], dtype=np.int64)
    chat = ChatTokens(ids, np.zeros(1, dtype=bool))
    image_token = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    return build_sample(chat, [], image_token_id=image_token, record_id=name)


def uneven_pack(tokenizer, geometry: VisionGeometry) -> Pack:
    """Several images of different size, none at all, and one-token samples between, before and behind the others."""
    samples = [
        one_token(tokenizer, "first"),
        make_sample(tokenizer, [screen(3, 5), screen(2, 7, 1)], "Where is Save?", "(512, 87)"),
        one_token(tokenizer, "between"),
        one_token(tokenizer, "between too"),
        make_sample(tokenizer, [], "Why?", "Because."),
        make_sample(tokenizer, [screen(6, 4, 2)], "And now?", "Open the menu."),
        one_token(tokenizer, "last"),
    ]
    return pack_samples(samples, geometry)


@pytest.fixture(scope="module")
def models(toy_folder):
    """The same weights with sdpa and with varlen, in training mode."""
    return {
        name: load_pretrained(str(toy_folder), attention=name, dtype=torch.float32).train()
        for name in ("sdpa", "varlen")
    }


def logits_and_gradients(model, pack: Pack, geometry: VisionGeometry) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    logits = model.lm_head(final_hidden(model, pack, geometry))
    weights = torch.linspace(-1, 1, logits.numel()).view_as(logits)  # every logit counts, each differently
    (logits * weights).sum().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters()}


def assert_close_to_scale(actual: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    """1e-5 of the tensor's largest entry: float32 sums in another order."""
    difference = (actual - expected).abs().max() / expected.abs().max().clamp_min(1e-30)
    assert difference < 1e-5, f"{name}: {difference:.1e}"


def test_varlen_equals_sdpa_on_a_packed_row(models, toy_tokenizer, geometry):
    pack = uneven_pack(toy_tokenizer, geometry)
    logits, gradients = logits_and_gradients(models["varlen"], pack, geometry)
    expected_logits, expected_gradients = logits_and_gradients(models["sdpa"], pack, geometry)
    assert_close_to_scale(logits, expected_logits, "logits")
    for name, expected in expected_gradients.items():
        assert_close_to_scale(gradients[name], expected, name)


@torch.no_grad()
def test_varlen_equals_every_sample_apart(models, toy_tokenizer, geometry):
    samples = [
        make_sample(toy_tokenizer, [screen(3, 5)], "Where?", "(5, 8)"),
        one_token(toy_tokenizer, "one"),
        make_sample(toy_tokenizer, [screen(4, 4, 1)], "And there?", "No."),
    ]
    packed = final_hidden(models["varlen"], pack_samples(samples, geometry), geometry)
    apart = [final_hidden(models["sdpa"], pack_samples([sample], geometry), geometry) for sample in samples]
    assert_close_to_scale(packed, torch.cat(apart), "hidden")


@torch.no_grad()
def test_borders_decide(models, toy_tokenizer, geometry):
    """The equality above could not fail if borders had no effect."""
    pack = uneven_pack(toy_tokenizer, geometry)
    inputs = model_inputs(pack, geometry, torch.float32) | {"position_ids": pack.position_ids[1:, None]}
    whole_row = torch.tensor([0, pack.num_tokens], dtype=torch.int32)
    moved = inputs | {"cu_seq_lens_q": whole_row, "cu_seq_lens_k": whole_row}
    moved_images = inputs | {"image_cu_seqlens": pack.vit_cu_seqlens[[0, -1]]}
    model = models["varlen"].model
    before = model(**inputs).last_hidden_state
    for other in (moved, moved_images):
        assert (model(**other).last_hidden_state - before).abs().max() > 1e-3


@torch.no_grad()
def test_one_call_per_layer_with_int_maxima_and_no_mask(models, toy_tokenizer, geometry, monkeypatch):
    """What a step costs besides the kernel: the borders as they came from the worker, no mask, no look at positions."""
    calls = []

    def recorded(module, query, key, value, attention_mask, **kwargs):
        calls.append((attention_mask, kwargs["cu_seq_lens_q"], kwargs["max_length_q"], kwargs["max_length_k"]))
        return varlen_attention(module, query, key, value, attention_mask, **kwargs)

    from transformers import AttentionInterface

    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_varlen", recorded)
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda *_: pytest.fail("waits for the device"))
    pack, model = uneven_pack(toy_tokenizer, geometry), models["varlen"]
    final_hidden(model, pack, geometry)
    depth, layers = len(model.model.visual.blocks), len(model.model.language_model.layers)
    assert len(calls) == depth + layers
    assert all(mask is None for mask, *_ in calls)
    assert all(borders is pack.vit_cu_seqlens for _, borders, *_ in calls[:depth])
    assert all(borders is pack.cu_seqlens for _, borders, *_ in calls[depth:])
    assert pack.cu_seqlens.dtype == pack.vit_cu_seqlens.dtype == torch.int32
    maxima = [(type(q), q, k) for _, _, q, k in calls]
    assert (
        maxima
        == [(int, pack.vit_max_seqlen, pack.vit_max_seqlen)] * depth
        + [(int, pack.max_seqlen, pack.max_seqlen)] * layers
    )


@torch.no_grad()
def test_a_packed_row_without_borders_is_refused(models, toy_tokenizer, geometry):
    inputs = model_inputs(uneven_pack(toy_tokenizer, geometry), geometry, torch.float32)
    bare = {name: value for name, value in inputs.items() if not name.startswith(("cu_seq", "max_length"))}
    with pytest.raises(ValueError, match="without cu_seq_lens_q"):
        models["varlen"](**bare)
    del inputs["max_length_q"]
    with pytest.raises(ValueError, match="max_length_q"):
        models["varlen"](**inputs)


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_vl_moe"])
def test_other_families_run_varlen_too(family, tmp_path):
    """Qwen3.5 without its kernels runs padded batches without borders: those go through sdpa, causal."""
    needs_plain_layers(family)
    folder = build_toy_model(tmp_path / family, family=family)
    models = [load_pretrained(str(folder), attention=name, dtype=torch.float32) for name in ("sdpa", "varlen")]
    from transformers import AutoTokenizer

    tokenizer, geometry = AutoTokenizer.from_pretrained(folder), VisionGeometry.from_config(models[0].config)
    pack = uneven_pack(tokenizer, geometry)
    (expected, expected_gradients), (logits, gradients) = (logits_and_gradients(m, pack, geometry) for m in models)
    assert_close_to_scale(logits, expected, "logits")
    for name in ("model.visual.patch_embed.proj.weight", "model.language_model.embed_tokens.weight"):
        assert_close_to_scale(gradients[name], expected_gradients[name], name)


@torch.no_grad()
def test_generation_with_left_padding_is_that_of_sdpa(toy_model, toy_tokenizer):
    """Masks and caches belong to generation: the same model that trains with varlen must generate."""
    model = copy.deepcopy(toy_model)
    batch = toy_tokenizer(["Where is Save?", "Open"], return_tensors="pt", padding=True, padding_side="left")
    batch.pop("token_type_ids", None)
    settings = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    expected = model.generate(**batch, **settings)
    use_varlen(model)
    answer = model.generate(**batch, **settings)
    assert torch.equal(answer.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(answer.logits), torch.stack(expected.logits), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("is_causal", [True, False])
def test_the_reference_is_attention_by_its_definition(is_causal):
    """Written out for one query at a time, in float64."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(9, heads, 4, generator=generator) for heads in (4, 2, 2))
    borders = torch.tensor([0, 1, 6, 7, 9], dtype=torch.int32)
    actual = reference_varlen(query, key, value, borders, scaling=0.3, is_causal=is_causal)
    segment = [0, 1, 1, 1, 1, 1, 2, 3, 3]
    for t in range(9):
        seen = [s for s in range(9) if segment[s] == segment[t] and (s <= t or not is_causal)]
        for head in range(4):
            scores = [math.exp(0.3 * float(query[t, head].double() @ key[s, head // 2].double())) for s in seen]
            mixed = sum(w * value[s, head // 2].double() for w, s in zip(scores, seen, strict=True)) / sum(scores)
            torch.testing.assert_close(actual[t, head].double(), mixed, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("device", [GPU])
def test_the_kernel_equals_the_reference(device):
    generator = torch.Generator().manual_seed(0)
    borders = torch.tensor([0, 1, 200, 201, 512], dtype=torch.int32)
    for is_causal, width in ((True, 128), (False, 64), (False, 72)):
        tensors = [torch.randn(512, heads, width, generator=generator) for heads in (8, 2, 2)]
        on_cpu = [x.clone().requires_grad_() for x in tensors]
        on_gpu = [x.to(device, torch.bfloat16).requires_grad_() for x in tensors]
        expected = reference_varlen(*on_cpu, borders, scaling=width**-0.5, is_causal=is_causal)
        module = torch.nn.Module()
        lengths = {"cu_seq_lens_q": borders.to(device), "cu_seq_lens_k": borders.to(device)}
        actual, _ = varlen_attention(
            module,
            *(x.transpose(0, 1)[None] for x in on_gpu),
            attention_mask=None,
            scaling=width**-0.5,
            is_causal=is_causal,
            max_length_q=311,
            max_length_k=311,
            **lengths,
        )
        expected.square().sum().backward()
        actual.float().square().sum().backward()
        # bfloat16 has 8 bits: 2 % of the largest entry.
        pairs = [(actual[0].detach(), expected), *((x.grad, y.grad) for x, y in zip(on_gpu, on_cpu, strict=True))]
        for gpu, cpu in pairs:
            assert (gpu.float().cpu() - cpu).abs().max() < 0.02 * cpu.abs().max()


def test_the_mask_is_left_to_sdpa_where_something_is_masked():
    plain = {"batch_size": 2, "q_length": 3, "kv_length": 3}
    assert mask_beside_borders(**plain) is None
    assert mask_beside_borders(**plain, allow_is_causal_skip=False).shape == (0,)
    padded = torch.tensor([[False, True, True], [True, True, True]])
    mask = mask_beside_borders(**plain, attention_mask=padded)
    assert mask.shape == (2, 1, 3, 3)
    assert not mask[0, 0, 2, 0]


def test_the_choice_is_said_and_impossible_requests_are_refused(caplog, monkeypatch):
    with caplog.at_level(logging.INFO, logger="training.model.attention"):
        assert choose_attention("auto", CPU) == "sdpa"
        assert choose_attention("varlen", CPU, torch.float32) == "varlen"
    assert [record.getMessage() for record in caplog.records] == [
        "attention: sdpa (device cpu)",
        "attention: varlen, as the recipe says",
    ]
    with pytest.raises(UserError, match="needs a GPU"):
        choose_attention("flash_attention_2", CPU)
    with pytest.raises(UserError, match="expected one of auto, flash_attention_3"):
        choose_attention("flash", CPU)


def test_the_order_on_a_gpu(monkeypatch):
    """A machine with a GPU, as far as the choice can see."""
    gpu, installed = torch.device("cuda", 0), {"flash_attention_3": True, "flash_attention_2": True}
    broken: dict[str, str] = {}
    monkeypatch.setattr("training.model.attention.is_flash_attn_3_available", lambda: installed["flash_attention_3"])
    monkeypatch.setattr("training.model.attention.is_flash_attn_2_available", lambda: installed["flash_attention_2"])
    monkeypatch.setattr("training.model.attention._import_problem", broken.get)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    capability = (9, 0)
    assert choose_attention("auto", gpu) == "flash_attention_3"
    installed["flash_attention_3"] = False
    assert choose_attention("auto", gpu) == "flash_attention_2"
    broken["flash_attn"] = "undefined symbol"
    assert choose_attention("auto", gpu) == "varlen"
    with pytest.raises(UserError, match="flash-attn is installed but does not load: undefined symbol"):
        choose_attention("flash_attention_2", gpu)
    installed["flash_attention_2"] = False
    assert choose_attention("auto", gpu) == "varlen"
    assert choose_attention("auto", gpu, torch.float32) == "sdpa"
    with pytest.raises(UserError, match=r"model\.attention=varlen: .*not torch\.float32; set model\.dtype=bfloat16"):
        choose_attention("varlen", gpu, torch.float32)
    with pytest.raises(UserError, match="package flash-attn is not installed"):
        choose_attention("flash_attention_2", gpu)
    capability = (7, 5)
    assert choose_attention("auto", gpu) == "sdpa"
    with pytest.raises(UserError, match=r"compute capability 7\.5"):
        choose_attention("varlen", gpu)


def test_a_package_that_does_not_load_is_noticed(tmp_path, monkeypatch):
    """As a wheel built for another torch: its metadata is fine, its library is not."""
    (tmp_path / "built_for_another_torch.py").write_text("raise ImportError('undefined symbol: _ZN3c10')")
    monkeypatch.syspath_prepend(tmp_path)
    assert _import_problem("built_for_another_torch") == "undefined symbol: _ZN3c10"
    assert _import_problem("json") == ""


def _by_definition(query, key, value, cu_q, scale, window):
    """What each of the kernels below computes, on any device; it groups heads."""
    return reference_varlen(query, key, value, cu_q, scaling=scale, is_causal=window == (-1, 0))


def without_the_flag(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    """torch 2.11: heads are grouped, no argument says so."""
    return _by_definition(query, key, value, cu_seq_q, scale, window_size)


def with_the_flag(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
):
    """torch 2.12 and later: other numbers of heads are refused without it."""
    if query.shape[1] != key.shape[1] and not enable_gqa:
        raise ValueError("expected as many key heads as query heads, or enable_gqa=True")
    return _by_definition(query, key, value, cu_seq_q, scale, window_size)


def without_scale_and_window(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False):
    """torch 2.10."""


@pytest.fixture
def take_kernel(monkeypatch):
    def take(kernel):
        monkeypatch.setattr(attention, "varlen_attn", kernel)
        monkeypatch.setattr(attention, "_VARLEN_PARAMETERS", attention._parameters_of(kernel))

    return take


@pytest.mark.parametrize("kernel", [without_the_flag, with_the_flag])
@pytest.mark.parametrize("num_kv_heads", [2, 8])
def test_every_torchs_kernel_is_called_as_it_takes_it(kernel, num_kv_heads, take_kernel):
    take_kernel(kernel)
    assert _has_varlen()
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(9, heads, 4, generator=generator).bfloat16() for heads in (8, num_kv_heads, num_kv_heads)]
    borders = torch.tensor([0, 1, 6, 9], dtype=torch.int32)
    actual = attention._cuda_varlen(*rows, borders, None, 5, 5, 0.5, True)
    assert torch.equal(actual, reference_varlen(*rows, borders, scaling=0.5, is_causal=True))


@pytest.mark.parametrize("kernel", [without_scale_and_window, None])
def test_a_kernel_without_what_is_passed_is_not_taken(kernel, take_kernel):
    take_kernel(kernel)
    assert not _has_varlen()


def test_this_torchs_kernel_is_known():
    assert _has_varlen()


def shared_pack(tokenizer, geometry: VisionGeometry) -> Pack:
    """Two screenshots with three questions each, interleaved, and samples of their own between them."""
    asked = [make_sample(tokenizer, [screen(4, 5, n % 2)], f"Where is {'it, ' * n}then?", "Here.") for n in range(6)]
    samples = [one_token(tokenizer, "first"), *asked, make_sample(tokenizer, [], "Why?", "Because.")]
    pack = pack_samples(samples, geometry, find_groups(samples, geometry.image_token_id))
    assert len(pack.shared) == 2
    return pack


def test_varlen_on_a_shared_prefix_equals_sdpa(models, toy_tokenizer, geometry):
    """sdpa per segment is held to samples one by one in test_prefixes.py."""
    pack = shared_pack(toy_tokenizer, geometry)
    logits, gradients = logits_and_gradients(models["varlen"], pack, geometry)
    expected_logits, expected_gradients = logits_and_gradients(models["sdpa"], pack, geometry)
    assert_close_to_scale(logits, expected_logits, "logits")
    for name, expected in expected_gradients.items():
        assert_close_to_scale(gradients[name], expected, name)


def test_gathered_keys_and_their_gradients_by_definition():
    borders = Borders(
        [Segment((0, 3), ((0, 3),)), Segment((3, 4), ((0, 3), (3, 4))), Segment((4, 6), ((0, 3), (4, 6)))],
        is_causal=True,
    )
    x = torch.randn(6, 2, 4, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    gathered = gather_keys(x, borders)
    order = [0, 1, 2, 0, 1, 2, 3, 0, 1, 2, 4, 5]
    assert torch.equal(gathered, x[order])
    given = torch.randn(gathered.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    gathered.backward(given)
    expected = torch.zeros(6, 2, 4, dtype=torch.float64).index_add(0, torch.tensor(order), given.double())
    assert torch.equal(x.grad, expected.bfloat16()), "summed exactly, rounded once"


def test_a_shared_prefix_reaches_the_kernel_as_unequal_borders(toy_tokenizer, geometry, take_kernel):
    """What the kernel on a GPU is given, with one in its place that keeps to its contract: queries and keys of unequal
    length per segment, causal as window (-1, 0), aligned at the lower right."""
    calls = []

    def kernel(query, key, value, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
        if window_size == (-1, 0):
            assert (len(query), len(key)) == (cu_q[-1], cu_k[-1])
            assert (max_q, max_k) == (int(cu_q.diff().max()), int(cu_k.diff().max()))
            assert bool((cu_k.diff() >= cu_q.diff()).all())
            calls.append((len(query), len(key)))
        return reference_varlen(query, key, value, cu_q, cu_k, scaling=scale, is_causal=window_size == (-1, 0))

    take_kernel(kernel)
    pack = shared_pack(toy_tokenizer, geometry)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(pack.num_tokens, n, 16, generator=generator).bfloat16() for n in (4, 2, 2)]
    keys, values = (gather_keys(row, pack.borders) for row in rows[1:])
    most = max(pack.borders.lengths), max(pack.borders.key_lengths)
    actual = attention._cuda_varlen(rows[0], keys, values, pack.cu_seqlens, pack.cu_seqlens_k, *most, 16**-0.5, True)
    expected = attention_by_definition(*(row.double() for row in rows), pack.borders, scaling=16**-0.5)
    assert (actual.double() - expected).norm() < LIMITS[torch.bfloat16] * expected.norm()
    assert calls == [(pack.num_tokens, sum(pack.borders.key_lengths))]


@torch.no_grad()
def test_shared_rows_without_their_borders_are_refused(models, toy_tokenizer, geometry):
    pack = shared_pack(toy_tokenizer, geometry)
    inputs = model_inputs(pack, geometry, torch.float32, with_borders=True)
    inputs["position_ids"] = inputs["position_ids"][1:]
    inputs["row_borders"] = Borders([Segment((0, 5), ((0, 5),)), Segment((5, 7), ((0, 5), (5, 7)))], is_causal=True)
    with pytest.raises(ValueError, match="expected cu_seq_lens_k and borders of a row of"):
        models["varlen"].model(**inputs)
