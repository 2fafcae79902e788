"""Model sizes with random weights, made on the device: what benchmarks run when there is no checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForImageTextToText, Qwen3VLConfig

from pixelprune.images.patch_embed import use_linear_patches
from training.composition.toy import build_tokenizer, toy_config
from training.model.attention import use_attention

# Published configs of Qwen3-VL-{2B,4B,8B}-Instruct. All share heads of 128 and 8 key-value heads.
TEXT = {
    "2b": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16},
    "4b": {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32},
    "8b": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32},
}
SMALL_VISION = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "deepstack_visual_indexes": [5, 11, 17]}
LARGE_VISION = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "deepstack_visual_indexes": [8, 16, 24]}
VISION = {"2b": SMALL_VISION, "4b": SMALL_VISION, "8b": LARGE_VISION}
# Between the toy and the published sizes, for a CPU: wide enough that matrix products take nearly all of the time.
SMALL_TEXT = {
    "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 64,
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 5e6, "mrope_interleaved": True, "mrope_section": [12, 10, 10],
    },
}  # fmt: skip
SMALL_TOWER = {
    "depth": 6, "hidden_size": 384, "intermediate_size": 1536, "num_heads": 6, "out_hidden_size": 512,
    "deepstack_visual_indexes": [1, 2, 4],
}  # fmt: skip
SHAPES = ("toy", "small", *TEXT)


def shape_config(name: str) -> Qwen3VLConfig:
    """The config of a size. The special tokens have the toy tokenizer's ids; the vocabulary has the published size.

    Raises ValueError for a size that is not in SHAPES.
    """
    toy = toy_config(build_tokenizer())
    if name == "small":
        toy.text_config.update(SMALL_TEXT)
        toy.vision_config.update(SMALL_TOWER)
    if name in ("toy", "small"):
        return toy
    if name not in TEXT:
        raise ValueError(f"expected one of the shapes {', '.join(SHAPES)}, got {name!r}")
    tied = name != "8b"
    text = {
        **TEXT[name],
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 262144,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5e6,
            "mrope_interleaved": True,
            "mrope_section": [24, 20, 20],
        },
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "eos_token_id": toy.text_config.eos_token_id,
        "pad_token_id": toy.text_config.pad_token_id,
    }
    vision = {
        **VISION[name],
        "num_heads": 16,
        "num_position_embeddings": 48 * 48,
        "out_hidden_size": TEXT[name]["hidden_size"],
    }
    token_ids = {key: getattr(toy, key) for key in ("image_token_id", "video_token_id", "vision_start_token_id")}
    return Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        vision_end_token_id=toy.vision_end_token_id,
        tie_word_embeddings=tied,
        **token_ids,
    )


def random_model(name: str, *, device: torch.device, dtype: torch.dtype, attention: str = "sdpa", seed: int = 0) -> Any:
    """A stock Qwen3-VL of that size with seeded random weights, created on the device in `dtype`.

    attention: as `training.model.attention.choose_attention` gives it.
    """
    torch.manual_seed(seed)
    stock = "sdpa" if attention == "varlen" else attention
    with device:
        model = AutoModelForImageTextToText.from_config(shape_config(name), dtype=dtype, attn_implementation=stock)
    use_attention(model, attention)
    use_linear_patches(model)
    return model.eval()
