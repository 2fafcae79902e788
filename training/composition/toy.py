"""Toy weights in a real folder: a Qwen3-VL or Qwen3.5 of a few million parameters that `from_pretrained` loads offline.

Configuration, tokenizer, chat template and preprocessor have the published models' form; only the sizes are toy.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

from pixelprune.family import FAMILIES, Family, published_layout

SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]

# ChatML as the published models use it: role headers, an image as start + one placeholder + end, and a header for
# the answer when a generation prompt is asked for.
CHAT_TEMPLATE = """\
{%- macro render(content) -%}
{%- if content is string -%}{{ content }}
{%- else -%}
{%- for part in content -%}
{%- if part.type == 'image' or 'image' in part -%}<|vision_start|><|image_pad|><|vision_end|>
{%- elif 'text' in part -%}{{ part.text }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' + render(message.content) + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""

# Letters, single digits, punctuation and white space apart, as the Qwen tokenizers split text.
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

DEFAULT_TEXTS = (
    "Click the button that saves the settings.",
    "Where is the search field? Point at it. (512, 87)",
    "Open the menu, select the last item and confirm with OK.",
)


def build_tokenizer(texts: Iterable[str] = DEFAULT_TEXTS, vocab_size: int = 2048) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on `texts`, with the real special tokens and chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=SPECIAL_TOKENS[1:],
        chat_template=CHAT_TEMPLATE,
        model_max_length=262144,
    )


def toy_config(
    tokenizer: PreTrainedTokenizerFast, family: str = "qwen3_vl", text_sizes: Mapping[str, int] | None = None
) -> PretrainedConfig:
    """A config with every part of the real family's (GQA, interleaved MRoPE, DeepStack, both kinds of layers, experts),
    a few layers deep. text_sizes: other sizes of the language model. Raises ValueError for an unknown family."""
    if family not in FAMILIES:
        raise ValueError(f"family: expected one of {', '.join(FAMILIES)}, got {family!r}")
    facts = FAMILIES[family]
    token_id = tokenizer.convert_tokens_to_ids
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 262144,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": token_id("<|im_end|>"),
        "pad_token_id": token_id("<|endoftext|>"),
    }
    vision: dict[str, Any] = {
        "depth": 4,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_heads": 4,
        "out_hidden_size": 192,
        "num_position_embeddings": 48 * 48,
    }
    if facts.deepstack:
        vision["deepstack_visual_indexes"] = [0, 1, 2]
    return AutoConfig.for_model(
        family,
        text_config=text | _layers(facts) | _experts(facts) | dict(text_sizes or {}),
        vision_config=vision,
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        tie_word_embeddings=True,
    )


def _layers(facts: Family) -> dict[str, Any]:
    # The stock model takes interleaved sections for granted; vLLM asks, and computes other positions without.
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_interleaved": True}
    if not facts.linear_attention:
        return {"head_dim": 32, "rope_parameters": {**rope, "mrope_section": [6, 5, 5]}}
    return {
        "head_dim": 64,
        "rope_parameters": {**rope, "mrope_section": [3, 3, 2], "partial_rotary_factor": 0.25},
        # Each kind stands in front of and behind the other, so that a leak in one is seen through the other.
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "attn_output_gate": True,
        "full_attention_interval": 2,
        "mamba_ssm_dtype": "float32",
        "mlp_only_layers": [],
        "mtp_num_hidden_layers": 0,
    }


def _experts(facts: Family) -> dict[str, Any]:
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
    rest: dict[str, Any] = {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True}
    if facts.linear_attention:
        rest = {"shared_expert_intermediate_size": 128}
    return sizes | rest if facts.experts else {}


def build_toy_model(
    folder: str | Path,
    texts: Iterable[str] = DEFAULT_TEXTS,
    *,
    family: str = "qwen3_vl",
    seed: int = 0,
    text_sizes: Mapping[str, int] | None = None,
) -> Path:
    """Write a loadable model folder with seeded random weights and return its path."""
    folder = Path(folder)
    tokenizer = build_tokenizer(texts)
    config = toy_config(tokenizer, family, text_sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config)
    model.generation_config = GenerationConfig(
        eos_token_id=config.text_config.eos_token_id, pad_token_id=config.text_config.pad_token_id, do_sample=False
    )
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    save_file(published_layout(family, tensors), folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)
    preprocessor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "size": {"shortest_edge": 256 * 256, "longest_edge": 4096 * 4096},
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n")
    return folder


def texts_of_records(path: Path) -> list[str]:
    """All text of a JSONL file in `messages` form, to train the toy tokenizer on."""
    texts: list[str] = []
    for line in path.read_text().splitlines():
        for message in json.loads(line)["messages"]:
            content = message["content"]
            parts = [{"text": content}] if isinstance(content, str) else content
            texts.extend(part["text"] for part in parts if "text" in part)
    return texts
