"""The toy against published configurations: other programs read keys that the stock classes take for granted."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from pixelprune.family import FAMILIES, published_layout
from training.composition.toy import build_toy_model

# Keys of config.json of Qwen3-VL-2B-Instruct, Qwen3-VL-30B-A3B-Instruct and Qwen3.5-2B as they are published.
# transformers 5 writes `rope_scaling` and `rope_theta` as `rope_parameters`, and `num_experts` of Qwen3-VL-MoE as
# `num_local_experts`.
TOP = "architectures image_token_id model_type text_config tie_word_embeddings video_token_id vision_config"
TOKENS = "vision_start_token_id vision_end_token_id"
TEXT = (
    "attention_bias attention_dropout eos_token_id head_dim hidden_act hidden_size initializer_range intermediate_size "
    "max_position_embeddings model_type num_attention_heads num_hidden_layers num_key_value_heads rms_norm_eps "
    "rope_parameters tie_word_embeddings use_cache vocab_size"
)
EXPERTS = "moe_intermediate_size num_experts_per_tok"
DENSE_OR_NOT = "decoder_sparse_step mlp_only_layers norm_topk_prob"
DELTA_NET = (
    "attn_output_gate full_attention_interval layer_types linear_conv_kernel_dim linear_key_head_dim "
    "linear_num_key_heads linear_num_value_heads linear_value_head_dim mamba_ssm_dtype mtp_num_hidden_layers"
)
VISION = (
    "depth hidden_act hidden_size in_channels initializer_range intermediate_size model_type num_heads "
    "num_position_embeddings out_hidden_size patch_size spatial_merge_size temporal_patch_size"
)
ROPE = "mrope_interleaved mrope_section rope_theta rope_type"
TEXT_KEYS = {
    "qwen3_vl": TEXT,
    "qwen3_vl_moe": f"{TEXT.replace(' tie_word_embeddings', '')} {EXPERTS} num_local_experts {DENSE_OR_NOT}",
    "qwen3_5": f"{TEXT} {DELTA_NET}",
    "qwen3_5_moe": f"{TEXT.replace(' intermediate_size', '')} {DELTA_NET} {EXPERTS} num_experts "
    "shared_expert_intermediate_size",
}


@pytest.fixture(scope="module", params=list(FAMILIES))
def toy(request, tmp_path_factory):
    return build_toy_model(tmp_path_factory.mktemp(request.param), family=request.param)


def test_the_toy_has_every_key_of_published_configurations(toy):
    config = json.loads((toy / "config.json").read_text())
    family = FAMILIES[config["model_type"]]
    assert not set(f"{TOP} {TOKENS}".split()) - set(config)
    assert not set(TEXT_KEYS[family.model_type].split()) - set(config["text_config"])
    rope = ROPE + (" partial_rotary_factor" if family.linear_attention else "")
    assert not set(rope.split()) - set(config["text_config"]["rope_parameters"])
    assert config["text_config"]["rope_parameters"]["mrope_interleaved"] is True
    deepstack = " deepstack_visual_indexes" if family.deepstack else ""
    assert not set((VISION + deepstack).split()) - set(config["vision_config"])


def test_an_exported_mixture_of_experts_keeps_that_layout(tmp_path):
    """The stock `save_pretrained` alone writes its own order, which vLLM refuses to load."""
    from transformers import AutoModelForImageTextToText

    from training.checkpoint.export import export_model
    from training.config.settings import Config, ModelSettings
    from training.model.loading import load_model_files

    folder = build_toy_model(tmp_path / "model", family="qwen3_vl_moe")
    model = AutoModelForImageTextToText.from_pretrained(folder)
    files = load_model_files(ModelSettings(path=str(folder)))
    out = export_model(tmp_path / "export", model, files, Config(), {})
    before, after = load_file(folder / "model.safetensors"), load_file(out / "model.safetensors")
    gate_up = "model.language_model.layers.0.mlp.experts.gate_up_proj"
    assert before[gate_up].shape == (4, 192, 2 * 128)  # experts, inputs, outputs
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    again = AutoModelForImageTextToText.from_pretrained(out)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert published_layout("qwen3_vl", before) is before
