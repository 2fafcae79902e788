"""The FLOPs model against `torch.utils.flop_counter` on toy models with eager attention."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from pixelprune.flops import DELTA_CHUNK, CostModel
from tests.kernels import needs_plain_layers

IMAGE, VISION_START, VISION_END = 500, 501, 502
SPECIAL = {"image_token_id": IMAGE, "vision_start_token_id": VISION_START, "vision_end_token_id": VISION_END}
VISION = {
    "depth": 3,
    "hidden_size": 48,
    "num_heads": 4,
    "intermediate_size": 112,
    "out_hidden_size": 96,
    "num_position_embeddings": 2304,
}


def toy_qwen3_vl() -> Qwen3VLConfig:
    text = {
        "hidden_size": 96,
        "intermediate_size": 176,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 24,
        "vocab_size": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 4, 4]},
    }
    vision = {**VISION, "deepstack_visual_indexes": [0, 1]}
    return Qwen3VLConfig(text_config=text, vision_config=vision, **SPECIAL, video_token_id=503)


def toy_qwen3_5() -> Qwen3_5Config:
    text = {
        "hidden_size": 96,
        "intermediate_size": 176,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 24,
        "vocab_size": 512,
        "linear_key_head_dim": 24,
        "linear_value_head_dim": 40,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [1, 1, 1],
            "partial_rotary_factor": 0.25,
        },
    }
    return Qwen3_5Config(text_config=text, vision_config=VISION, **SPECIAL, video_token_id=503)


EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 56}


def toy_qwen3_vl_moe() -> Qwen3VLMoeConfig:
    """Experts in layers 1 and 3; the other two are dense."""
    config = toy_qwen3_vl().to_dict()
    text = {**config["text_config"], **EXPERTS, "decoder_sparse_step": 1, "mlp_only_layers": [0, 2]}
    text["model_type"], vision = "qwen3_vl_moe_text", {**config["vision_config"], "model_type": "qwen3_vl_moe_vision"}
    return Qwen3VLMoeConfig(text_config=text, vision_config=vision, **SPECIAL, video_token_id=503)


def toy_qwen3_5_moe() -> Qwen3_5MoeConfig:
    text = {**toy_qwen3_5().to_dict()["text_config"], **EXPERTS, "shared_expert_intermediate_size": 40}
    text["model_type"] = "qwen3_5_moe_text"
    return Qwen3_5MoeConfig(text_config=text, vision_config=VISION, **SPECIAL, video_token_id=503)


MODELS = {
    "qwen3_vl": (toy_qwen3_vl, Qwen3VLForConditionalGeneration),
    "qwen3_5": (toy_qwen3_5, Qwen3_5ForConditionalGeneration),
    "qwen3_vl_moe": (toy_qwen3_vl_moe, Qwen3VLMoeForConditionalGeneration),
    "qwen3_5_moe": (toy_qwen3_5_moe, Qwen3_5MoeForConditionalGeneration),
}
# Per image kept blocks, text tokens (at least 2 per image), supervised tokens.
SHAPES = [([60, 24], 108, 11), ([12], 52, 30), ([7, 9, 16], 32, 1), ([], 128, 128)]


def counted(name: str, kept: list[int], text_tokens: int, supervised: int, training: bool) -> tuple[float, dict]:
    """FLOPs that torch counts in a stock forward (and backward) of one row, in total and by module."""
    needs_plain_layers(name)
    torch.manual_seed(0)
    make_config, model_class = MODELS[name]
    model = model_class._from_config(make_config(), attn_implementation="eager").train(training)
    if name.endswith("moe"):
        model.set_experts_implementation("eager")
    ids: list[int] = []
    for count in kept:
        ids += [VISION_START, *[IMAGE] * count, VISION_END]
    ids += [5] * (text_tokens - 2 * len(kept))
    inputs = {
        "input_ids": torch.tensor([ids]),
        "mm_token_type_ids": torch.tensor([[int(token == IMAGE) for token in ids]]),
        "logits_to_keep": torch.arange(len(ids) - supervised, len(ids)),
        "use_cache": False,
    }
    if kept:
        inputs["pixel_values"] = torch.randn(4 * sum(kept), 1536)
        inputs["image_grid_thw"] = torch.tensor([[1, 2, 2 * count] for count in kept])
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(training):
        logits = model(**inputs).logits
        assert logits.shape == (1, supervised, 512)
        if training:
            logits.sum().backward()
    counts = counter.get_flop_counts()
    by_module = {module: float(sum(flops.values())) for module, flops in counts.items()}
    return by_module.pop("Global"), by_module


def delta_corrections(num_tokens: int, training: bool) -> float:
    """What the counter gets wrong in the toy's 3 gated delta nets (4 heads of 24 and 40, 256 mixed channels).

    It sees no triangular solve. Of a solve's backward it sees one product, as a full square where half is needed. It
    takes the depthwise convolution's weight gradient for a dense one.
    """
    solve = 3 * 4 * DELTA_CHUNK * (24 + 40) * num_tokens
    if not training:
        return solve
    convolution = 3 * 2 * 4 * 256 * num_tokens
    return 3 * solve - 2 * solve + convolution - 256 * convolution


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_total_is_what_torch_counts(name: str, training: bool, shape: tuple[list[int], int, int]) -> None:
    kept, text_tokens, supervised = shape
    num_tokens = sum(kept) + text_tokens
    expected, _ = counted(name, kept, text_tokens, supervised, training)
    if name.startswith("qwen3_5"):
        assert num_tokens % DELTA_CHUNK == 0  # else the reference pads
        expected += delta_corrections(num_tokens, training)
    cost = CostModel.from_config(MODELS[name][0](), causal_half=False)
    got = cost.sample_flops(kept_blocks=kept, text_tokens=text_tokens, supervised_tokens=supervised, training=training)
    assert got == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("name", MODELS)
def test_parts_are_what_torch_counts(name: str) -> None:
    kept, text_tokens, supervised = SHAPES[0]
    num_tokens = sum(kept) + text_tokens
    _, modules = counted(name, kept, text_tokens, supervised, training=False)
    parts = CostModel.from_config(MODELS[name][0](), causal_half=False).breakdown(
        kept_blocks=kept, text_tokens=text_tokens, supervised_tokens=supervised, training=False
    )
    root = MODELS[name][1].__name__

    def of(*suffixes: str) -> float:
        return sum(flops for module, flops in modules.items() if module.endswith(suffixes))

    assert parts["merger"] == of(f"{root}.model.visual.merger")
    assert parts["deepstack"] == of("deepstack_merger_list.0", "deepstack_merger_list.1")
    assert parts["head"] == of(f"{root}.lm_head")
    vit = of(f"{root}.model.visual") - parts["merger"] - parts["deepstack"]
    assert parts["vit_attention"] + parts["vit_linear"] == pytest.approx(vit, rel=1e-9)
    vit_linear = of("patch_embed", ".attn.qkv", ".attn.proj", ".mlp.linear_fc1", ".mlp.linear_fc2")
    assert parts["vit_linear"] == pytest.approx(vit_linear, rel=1e-9)
    llm = of(f"{root}.model.language_model")
    delta_layers = of(".linear_attn")
    delta_linear = of("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj")
    linear = of("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj") + delta_linear
    linear += of("mlp.gate", "mlp.experts", "mlp.shared_expert_gate")
    assert parts["llm_linear"] == linear
    rule = delta_layers - delta_linear
    assert parts["llm_delta"] == pytest.approx(
        rule + name.startswith("qwen3_5") * delta_corrections(num_tokens, False), rel=0.02
    )
    assert (parts["llm_delta"] == 0) == name.startswith("qwen3_vl")
    # What is left of the LLM is attention and, at a few tenths of a percent, the table of rotary angles.
    assert parts["llm_attention"] == pytest.approx(llm - linear - rule, rel=0.02)


def test_pruning_saves_more_than_in_proportion() -> None:
    cost = CostModel.from_config(toy_qwen3_vl())
    full, pruned = (
        cost.breakdown(kept_blocks=[kept], text_tokens=0, supervised_tokens=0, training=False) for kept in (400, 100)
    )
    assert pruned["vit_attention"] == full["vit_attention"] / 16
    assert pruned["vit_linear"] == full["vit_linear"] / 4
    assert pruned["merger"] == full["merger"] / 4
    assert pruned["llm_attention"] == pytest.approx(full["llm_attention"] / 16, rel=0.01)


def test_images_do_not_attend_to_each_other() -> None:
    cost = CostModel.from_config(toy_qwen3_vl())
    arguments = {"text_tokens": 10, "supervised_tokens": 3, "training": True}
    together = cost.breakdown(kept_blocks=[50], **arguments)
    apart = cost.breakdown(kept_blocks=[25, 25], **arguments)
    assert apart.pop("vit_attention") == together.pop("vit_attention") / 2
    assert apart == together


def test_causal_pairs_are_the_lower_triangle() -> None:
    arguments = {"kept_blocks": [9], "text_tokens": 8, "supervised_tokens": 2, "training": False}
    half = CostModel.from_config(toy_qwen3_vl()).breakdown(**arguments)
    full = CostModel.from_config(toy_qwen3_vl(), causal_half=False).breakdown(**arguments)
    assert half.pop("llm_attention") == full.pop("llm_attention") * (17 * 18 / 2) / 17**2
    assert half == full


def test_frozen_vision_blocks_have_no_backward() -> None:
    arguments = {"kept_blocks": [9], "text_tokens": 8, "supervised_tokens": 2}
    forward = CostModel.from_config(toy_qwen3_vl()).breakdown(**arguments, training=False)
    trained = CostModel.from_config(toy_qwen3_vl(), freeze_vit=True).breakdown(**arguments, training=True)
    for part, flops in trained.items():
        assert flops == forward[part] * (1 if part.startswith("vit") else 3)


@pytest.mark.parametrize("name", MODELS)
def test_batches_are_samples(name: str) -> None:
    cost = CostModel.from_config(MODELS[name][0]())
    rng = np.random.default_rng(0)
    samples = [
        ([int(k) for k in rng.integers(1, 3000, size=rng.integers(0, 4))], int(rng.integers(1, 900)), 7)
        for _ in range(50)
    ]
    batch = cost.batch_flops(
        image_tokens=np.array([sum(kept) for kept, _, _ in samples], dtype=np.int32),
        patch_squares=np.array([cost.patch_squares(kept) for kept, _, _ in samples]),
        text_tokens=np.array([text for _, text, _ in samples], dtype=np.int32),
        supervised_tokens=np.array([supervised for _, _, supervised in samples], dtype=np.int16),
        training=True,
    )
    assert batch.shape == (50,)
    single = [
        cost.sample_flops(kept_blocks=kept, text_tokens=text, supervised_tokens=supervised, training=True)
        for kept, text, supervised in samples
    ]
    np.testing.assert_allclose(batch, single, rtol=1e-12)
    assert cost.patch_squares([3, 5]) == 12**2 + 20**2


@pytest.mark.parametrize("name", MODELS)
def test_dicts_give_what_configs_give(name: str) -> None:
    config = MODELS[name][0]()
    assert CostModel.from_config(config.to_dict()) == CostModel.from_config(config)
    if name.startswith("qwen3_5"):
        without = config.to_dict()
        del without["text_config"]["layer_types"]
        assert CostModel.from_config(without) == CostModel.from_config(config)


def test_published_size_is_plausible() -> None:
    # A Qwen3-VL-2B: per LLM token the products cost twice the weights that are multiplied, 1.4 billion of them.
    text = {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
    }
    cost = CostModel.from_config(Qwen3VLConfig(text_config=text))
    weights = 28 * (2048 * 128 * (2 * 16 + 2 * 8) + 3 * 2048 * 6144)
    assert cost.llm_linear == 2 * weights
    assert cost.head == 2 * 2048 * 151936


def test_other_configs_are_refused() -> None:
    with pytest.raises(ValueError, match=r"one of qwen3_vl, .*qwen3_5.*, got 'llava'"):
        CostModel.from_config({"model_type": "llava"})
    config = toy_qwen3_vl().to_dict()
    del config["text_config"]["head_dim"]
    with pytest.raises(ValueError, match="no field 'head_dim'"):
        CostModel.from_config(config)
    config = toy_qwen3_5().to_dict()
    config["text_config"]["layer_types"] = ["full_attention", "sliding"]
    with pytest.raises(ValueError, match="expected layer_types for 4"):
        CostModel.from_config(config)


def test_the_papers_ratio_in_the_papers_convention():
    """Table 4: 6.6x for Qwen3-VL-2B at 26.2 % of a screenshot of 2048 x 2048 pixels, a short instruction behind it."""
    from benchmarks.parts.shapes import shape_config

    triangle = CostModel.from_config(shape_config("2b"))
    ratios = []
    for cost in (triangle.whole_square(), triangle):
        full, pruned = (
            cost.sample_flops(kept_blocks=[kept], text_tokens=22, supervised_tokens=1, training=False)
            for kept in (4096, round(0.262 * 4096))
        )
        ratios.append(full / pruned)
    assert ratios == pytest.approx([6.58, 6.45], abs=0.01)
