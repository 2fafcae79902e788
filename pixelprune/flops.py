"""What a sample costs in floating-point operations, from any Qwen3-VL or Qwen3.5 config (paper appendix E).

Counted are matrix products, two operations per multiply-add; norms, activations, rotations and the resampling of the
position grid are not. Conventions:

- A training step is three forwards: the backward pass has two products for each of the forward's (one for the patch
  embedding, whose input needs no gradient). Recomputation under gradient checkpointing is not counted (model FLOPs, as
  MFU wants them).
- The output head is counted at supervised positions only, where `logits_to_keep` makes logits.
- Attention of the LLM is causal: token i sees i tokens, so L tokens make L (L + 1) / 2 pairs. `causal_half=False`
  counts the full square, as the paper, `torch.utils.flop_counter` with eager attention and some MFU figures do
  (`whole_square()`); ratios of Full to pruned are 2 % higher in it. Attention of the vision tower is full within each
  image.
- Gated delta net layers (Qwen3.5) are counted as the chunked rule with chunks of 64 tokens, triangular solves included.
  A last chunk that is not full is counted by its tokens; the reference implementation pads it.
- Mixture-of-experts layers are counted by the experts a token is sent to, the shared expert and the router.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pixelprune.family import FAMILIES, Family

__all__ = ["DELTA_CHUNK", "CostModel"]

DELTA_CHUNK = 64
"""Tokens per chunk of the gated delta rule in transformers and flash-linear-attention."""


@dataclass(frozen=True)
class CostModel:
    """Forward cost coefficients of one model, and the costs they give. Make it with `from_config`.

    patch_embed: per patch. vit_linear: per patch: projections and MLPs of all blocks.
    vit_attention: per ordered pair of patches of one image.
    merger, deepstack: per image token (block): the main merger; all DeepStack mergers together.
    llm_linear: per token: projections and MLPs of all layers, those of linear-attention layers included.
    llm_attention: per ordered pair of tokens that attend, over the full-attention layers.
    llm_delta: per token: convolution and gated delta rule of the linear-attention layers.
    head: per supervised token.
    patches_per_block: ViT patches that merge into one image token.
    """

    patch_embed: float
    vit_linear: float
    vit_attention: float
    merger: float
    deepstack: float
    llm_linear: float
    llm_attention: float
    llm_delta: float
    head: float
    patches_per_block: int
    causal_half: bool = True
    freeze_vit: bool = False

    @classmethod
    def from_config(cls, config: Any, *, causal_half: bool = True, freeze_vit: bool = False) -> CostModel:
        """From a Hugging Face config object or the dict in a config.json.

        causal_half: see the module's conventions. freeze_vit: the vision blocks get no backward pass (mergers do).
        Raises ValueError for other model families and for a missing field.
        """
        model_type = _get(config, "model_type")
        if model_type not in FAMILIES:
            raise ValueError(f"FLOPs: expected a config of one of {', '.join(FAMILIES)}, got {model_type!r}")
        vision, text = _get(config, "vision_config"), _get(config, "text_config")
        return cls(
            **_vision_costs(vision),
            **_text_costs(text, FAMILIES[model_type]),
            causal_half=causal_half,
            freeze_vit=freeze_vit,
        )

    def whole_square(self) -> CostModel:
        """The same model in the paper's convention: causal attention counted as the whole square (Table 4)."""
        return replace(self, causal_half=False)

    def breakdown(
        self, *, kept_blocks: Sequence[int], text_tokens: int, supervised_tokens: int, training: bool
    ) -> dict[str, float]:
        """FLOPs of one sample by part; arguments as in `sample_flops`."""
        return self._parts(
            float(sum(kept_blocks)), float(self.patch_squares(kept_blocks)), text_tokens, supervised_tokens, training
        )

    def sample_flops(
        self, *, kept_blocks: Sequence[int], text_tokens: int, supervised_tokens: int, training: bool
    ) -> float:
        """FLOPs of one sample.

        kept_blocks: image tokens of each image (all of its blocks for the Full model).
        text_tokens: tokens of the row that are not image tokens. supervised_tokens: positions where logits are made.
        """
        parts = self.breakdown(
            kept_blocks=kept_blocks,
            text_tokens=text_tokens,
            supervised_tokens=supervised_tokens,
            training=training,
        )
        return sum(parts.values())

    def vision_flops(self, image_tokens: Any, patch_squares: Any, *, training: bool) -> Any:
        """FLOPs of the vision tower and its mergers; numbers or arrays, as in `batch_flops`."""
        parts = self._parts(image_tokens, patch_squares, 0, 0, training)
        return sum(parts[name] for name in ("vit_attention", "vit_linear", "merger", "deepstack"))

    def prefill_flops(
        self,
        *,
        kept_blocks: Sequence[int],
        text_tokens: int,
        full_blocks: Sequence[int] = (),
        tower_share: float = 0.0,
    ) -> float:
        """FLOPs of a prompt up to its first new token.

        full_blocks, tower_share: for blocks that are dropped inside the vision tower (Table 7): of all blocks of each
        image, and the share of the tower's layers that compute them. The patches of all of them are embedded then; what
        lies behind the tower sees kept blocks alone.
        """
        flops = self.sample_flops(kept_blocks=kept_blocks, text_tokens=text_tokens, supervised_tokens=1, training=False)
        if tower_share == 0:
            return flops
        more_patches = self.patches_per_block * (sum(full_blocks) - sum(kept_blocks))
        more_squares = self.patch_squares(full_blocks) - self.patch_squares(kept_blocks)
        flops += (self.patch_embed + tower_share * self.vit_linear) * more_patches
        return flops + tower_share * self.vit_attention * more_squares

    def batch_flops(
        self,
        *,
        image_tokens: np.ndarray,
        patch_squares: np.ndarray,
        text_tokens: np.ndarray,
        supervised_tokens: np.ndarray,
        training: bool,
    ) -> np.ndarray:
        """FLOPs of N samples, float64 (N,), from their totals.

        image_tokens: image tokens over all images of the sample. patch_squares: sum over its images of the squared
        number of ViT patches (see `patch_squares`). The others as in `sample_flops`; all arrays are (N,).
        """
        columns = (image_tokens, patch_squares, text_tokens, supervised_tokens)
        tokens, squares, text, supervised = (np.asarray(column, dtype=np.float64) for column in columns)
        return np.asarray(sum(self._parts(tokens, squares, text, supervised, training).values()), dtype=np.float64)

    def patch_squares(self, kept_blocks: Sequence[int]) -> int:
        """Sum over the images of the squared number of ViT patches: what attention per image costs."""
        return sum((int(kept) * self.patches_per_block) ** 2 for kept in kept_blocks)

    def _parts(
        self, image_tokens: Any, patch_squares: Any, text_tokens: Any, supervised: Any, training: bool
    ) -> dict[str, Any]:
        tokens = image_tokens + text_tokens
        pairs = tokens * (tokens + 1) / 2 if self.causal_half else tokens * tokens
        factor = 3.0 if training else 1.0
        vit_factor, embed_factor = (1.0, 1.0) if self.freeze_vit or not training else (3.0, 2.0)
        per_patch = embed_factor * self.patch_embed + vit_factor * self.vit_linear
        return {
            "vit_attention": vit_factor * self.vit_attention * patch_squares,
            "vit_linear": per_patch * self.patches_per_block * image_tokens,
            "merger": factor * self.merger * image_tokens,
            "deepstack": factor * self.deepstack * image_tokens,
            "llm_attention": factor * self.llm_attention * pairs,
            "llm_delta": factor * self.llm_delta * tokens,
            "llm_linear": factor * self.llm_linear * tokens,
            "head": factor * self.head * supervised,
        }


def _get(config: Any, name: str, default: Any = None) -> Any:
    value = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
    if value is None:
        value = default
    if value is None:
        raise ValueError(f"FLOPs: the model's config has no field {name!r}")
    return value


def _product(size: Any) -> int:
    """Pixels of a patch, whose side may be one number or a pair."""
    return int(size) ** 2 if isinstance(size, int) else int(size[0]) * int(size[1])


def _vision_costs(vision: Any) -> dict[str, Any]:
    width, depth, inner = (_get(vision, name) for name in ("hidden_size", "depth", "intermediate_size"))
    frames = _get(vision, "temporal_patch_size")
    patch_values = _get(vision, "in_channels") * (frames if isinstance(frames, int) else frames[0])
    patch_values *= _product(_get(vision, "patch_size"))
    patches_per_block = _get(vision, "spatial_merge_size") ** 2
    merged = width * patches_per_block
    merger = 2 * merged * (merged + _get(vision, "out_hidden_size"))
    return {
        "patch_embed": 2.0 * patch_values * width,
        # Four width x width projections (q, k, v, output) and the two matrices of the MLP.
        "vit_linear": depth * 2.0 * (4 * width * width + 2 * width * inner),
        # Scores and weighted values: two products of the heads' total width.
        "vit_attention": depth * 4.0 * width,
        "merger": float(merger),
        "deepstack": float(merger * len(_get(vision, "deepstack_visual_indexes", ()))),
        "patches_per_block": patches_per_block,
    }


def _text_costs(text: Any, family: Family) -> dict[str, Any]:
    width, num_layers = (_get(text, name) for name in ("hidden_size", "num_hidden_layers"))
    heads, kv_heads, head_dim = (
        _get(text, name) for name in ("num_attention_heads", "num_key_value_heads", "head_dim")
    )
    num_full, delta_linear, delta_rule = num_layers, 0.0, 0.0
    query_matrices = 1
    if family.linear_attention:
        query_matrices = 2  # the query projection also makes the gate on the attention's output
        num_full = _num_full_layers(text, num_layers)
        delta_linear, delta_rule = _delta_costs(text, width)
    attention = width * head_dim * ((query_matrices + 1) * heads + 2 * kv_heads)
    mlp = _expert_products(text, width, num_layers) if family.experts else num_layers * _swiglu(text, width)
    return {
        "llm_linear": 2.0 * (num_full * attention + mlp) + (num_layers - num_full) * delta_linear,
        "llm_attention": num_full * 4.0 * heads * head_dim,
        "llm_delta": (num_layers - num_full) * delta_rule,
        "head": 2.0 * width * _get(text, "vocab_size"),
    }


def _swiglu(text: Any, width: int, inner_field: str = "intermediate_size") -> int:
    """Multiply-adds per token of an MLP with gate, up and down matrices."""
    return 3 * width * int(_get(text, inner_field))


def _expert_products(text: Any, width: int, num_layers: int) -> int:
    """Multiply-adds per token of all MLPs, where all layers or some of them have experts."""
    step, dense = _get(text, "decoder_sparse_step", 1), _get(text, "mlp_only_layers", ())
    num_sparse = sum(layer not in dense and (layer + 1) % step == 0 for layer in range(num_layers))
    experts = _get(text, "num_experts_per_tok") * _swiglu(text, width, "moe_intermediate_size")
    # Config objects and published files say num_experts, files that transformers wrote num_local_experts.
    num_experts = _get(text, "num_experts", 0) or _get(text, "num_local_experts")
    sparse = experts + width * num_experts  # the router
    if _get(text, "shared_expert_intermediate_size", 0):
        sparse += _swiglu(text, width, "shared_expert_intermediate_size") + width  # and its gate
    num_dense = num_layers - num_sparse
    return int(num_sparse * sparse + (num_dense * _swiglu(text, width) if num_dense else 0))


def _num_full_layers(text: Any, num_layers: int) -> int:
    layer_types = list(_get(text, "layer_types", ()))
    if not layer_types:  # an older config.json gives the spacing instead: every fourth layer, unless it says otherwise
        return num_layers // int(_get(text, "full_attention_interval", 4))
    unknown = set(layer_types) - {"full_attention", "linear_attention"}
    if unknown or len(layer_types) != num_layers:
        raise ValueError(f"FLOPs: expected layer_types for {num_layers} full or linear layers, got {layer_types}")
    return layer_types.count("full_attention")


def _delta_costs(text: Any, width: int) -> tuple[float, float]:
    """Per token and layer: the projections of a gated delta net; its convolution and chunked rule."""
    key_heads, heads = _get(text, "linear_num_key_heads"), _get(text, "linear_num_value_heads")
    key_dim, value_dim = _get(text, "linear_key_head_dim"), _get(text, "linear_value_head_dim")
    mixed = 2 * key_heads * key_dim + heads * value_dim  # q, k and v side by side
    projections = 2.0 * width * (mixed + 2 * heads * value_dim + 2 * heads)  # qkv; z and output; b and a
    convolution = 2.0 * _get(text, "linear_conv_kernel_dim") * mixed
    # Per token and head: K K^T and Q K^T; attention times values; state read by keys, read by queries and written.
    within = 2.0 * DELTA_CHUNK * (2 * key_dim + value_dim)
    across = 6.0 * key_dim * value_dim
    solves = float(DELTA_CHUNK * (key_dim + value_dim))  # half of a square product: the system is triangular
    return projections, convolution + heads * (within + across + solves)
