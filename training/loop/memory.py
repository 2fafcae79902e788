"""How much memory a rank needs at its peak, and the cheapest recomputation that fits: printed at the start of a run.

    T = LLM tokens and P = ViT patches of a full pack, D / V = width of LLM / ViT, b = bytes of a weight

The activations of a layer are counted from what the stock modules save for backward (the formulas are beside them and
a test holds them against what autograd really saves). The rest is weights, ZeRO's states and buffers, the chunked head
and, with an online teacher, its weights. The estimate is for packs at both caps: most packs are smaller.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from transformers import AutoModelForImageTextToText

from pixelprune.family import family_of
from pixelprune.flops import CostModel
from training.config.settings import AUTO, Config, ModelSettings
from training.data.settings import DataSettings
from training.distributed.engine import bucket_elements
from training.distributed.ranks import Ranks
from training.loop.context import RunContext
from training.model.parameters import part_of
from training.teacher.files import TeacherPlan

logger = logging.getLogger(__name__)

ITEMSIZE = {"bfloat16": 2, "float32": 4}
USABLE = 0.9
"""Share of the device's memory that an estimate may fill: fragmentation, kernels' workspaces and the CUDA context."""
LARGEST_IMAGE = 16384
"""ViT patches of a 4-megapixel screenshot: what attention FLOPs are weighed with."""
EVERY = (0, 4, 3, 2, 1)
"""Policies tried for a tower: recompute no layer, every k-th, all."""


@dataclass(frozen=True)
class Recomputation:
    """Every k-th layer of a tower is recomputed in backward; 0 = none, 1 = all."""

    vit: int
    llm: int

    def describe(self) -> str:
        words = {0: "no layer", 1: "every layer"}
        towers = (("ViT", self.vit), ("LLM", self.llm))
        return ", ".join(f"{name} {words.get(every, f'one layer in {every}')}" for name, every in towers)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes at the peak of a training step on one rank."""

    weights: float
    optimizer: float
    """ZeRO's share: float32 master weights and both moments of Adam."""
    gradients: float
    """Accumulated gradients and the buckets they travel in."""
    vit: float
    """What the vision tower and its mergers keep for backward."""
    llm: float
    """What the language model keeps for backward."""
    workspace: float
    """The head's chunk or one layer's recomputed activations and gradients, whichever is larger."""
    teacher: float
    generation: float = 0.0
    """Keys and values of the answers that the student writes before a step, as far as they exceed what the step itself
    keeps for backward, which is not there yet."""

    @property
    def total(self) -> float:
        return sum(dataclasses.astuple(self))

    def describe(self) -> str:
        parts = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        listed = ", ".join(f"{name} {size / 1e9:.3g}" for name, size in parts.items() if size)
        return f"about {self.total / 1e9:.3g} GB at full packs ({listed})"


@dataclass(frozen=True)
class TowerBytes:
    """Activation bytes of one tower for one pack: per layer kept or recomputed, and outside of the layers."""

    num_layers: int
    kept: float
    """What a layer saves for backward."""
    recomputed: float
    """What a recomputed layer saves: its input."""
    outside: float

    def saved(self, every: int) -> float:
        num_recomputed = -(-self.num_layers // every) if every else 0
        return self.outside + num_recomputed * self.recomputed + (self.num_layers - num_recomputed) * self.kept

    def workspace(self, every: int) -> float:
        """Gradients of a layer's activations, about as many as are kept of it; recomputed ones stand beside them."""
        return self.kept * (2 if every else 1)


def llm_bytes(
    text: Any, num_tokens: int, itemsize: int, attention: str, *, fused: bool = False, gathered_keys: float = 0
) -> TowerBytes:
    """Activations of the language model: text_config of Qwen3-VL, T tokens. fused: RMSNorm and SwiGLU of liger.

    gathered_keys: tokens whose keys and values a layer keeps a second time, in front of suffixes that share a prefix.
    sdpa and eager keep them for all heads: with the mask that a suffix needs the stock functions repeat them.
    """
    width, inner, heads, kv_heads = (
        text.hidden_size,
        text.intermediate_size,
        text.num_attention_heads,
        text.num_key_value_heads,
    )
    head_dim, b = text.head_dim, itemsize
    # A stock RMSNorm keeps a float32 copy of its input and the normalised values; liger's only the input.
    norm = b if fused else 4 + b
    per_token = 2 * (norm + b) * width  # two norms, and their results as the linear layers' input
    per_token += norm * (heads + kv_heads) * head_dim  # norms of q and k
    per_token += b * 2 * (heads + kv_heads) * head_dim + 4 * heads  # q, k, v, result, log-sum-exp
    per_token += (3 if fused else 4) * b * inner  # gate, up, (silu of gate,) product
    pairs = 0.0
    if attention in ("sdpa", "eager"):
        # The samples' results, put together again.
        per_token += b * heads * head_dim
    if attention == "eager":
        # k and v repeated for all heads; scores of a sample, counted as if it filled the pack.
        per_token += b * 2 * (heads - kv_heads) * head_dim
        pairs = (4 + 2 * b) * heads
    kept = per_token * num_tokens + pairs * num_tokens**2
    kept += b * 2 * (kv_heads if attention == "varlen" else heads) * head_dim * gathered_keys
    final_norm = norm * width * num_tokens
    return TowerBytes(text.num_hidden_layers, kept, b * width * num_tokens, final_norm)


def vit_bytes(vision: Any, num_patches: int, itemsize: int, attention: str) -> TowerBytes:
    """Activations of the vision tower with its mergers: vision_config of Qwen3-VL, P patches."""
    width, inner, b = vision.hidden_size, vision.intermediate_size, itemsize
    # Both norms' input and result, the qkv product (v is a view of it), rotated q and k, result.
    per_patch = b * (4 * width + 3 * width + 2 * width + width) + 16 + 4 * vision.num_heads
    per_patch += 2 * b * inner  # before and behind the activation
    if attention in ("sdpa", "eager"):
        per_patch += b * width  # the images' results, put together again
    num_mergers = 1 + len(getattr(vision, "deepstack_visual_indexes", ()))
    merger = b * (3 * width + vision.out_hidden_size / 4)  # per patch: norm, before and behind the activation; result
    pixels = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    outside = num_mergers * merger + b * (pixels + width)
    return TowerBytes(vision.depth, per_patch * num_patches, b * width * num_patches, outside * num_patches)


def estimate_memory(
    config: Config,
    model: Any,
    policy: Recomputation,
    *,
    world_size: int,
    attention: str,
    teacher_weights: float = 0,
) -> MemoryEstimate:
    """Peak bytes of one rank in a training step with full packs.

    model: the stock model on any device (meta too), with the recipe's parts frozen. teacher_weights: weights that the
    teacher keeps on this rank.
    """
    text, vision = model.config.text_config, model.config.vision_config
    b = ITEMSIZE[config.model.dtype]
    gathered = _most_gathered_keys(config.data)
    llm = llm_bytes(text, config.data.pack_tokens, b, attention, fused=config.model.liger, gathered_keys=gathered)
    vit = vit_bytes(vision, config.data.pack_patches, b, attention)
    trains_vit = any(p.requires_grad for name, p in model.named_parameters() if part_of(name) == "vit")
    if not trains_vit:  # without a trained weight before or in it nothing of a layer is kept
        vit = TowerBytes(vit.num_layers, 0.0, 0.0, vit.outside)
    head = _head_bytes(config, text, b, trained=model.get_output_embeddings().weight.requires_grad)
    step = {
        "vit": vit.saved(policy.vit),
        "llm": llm.saved(policy.llm),
        "workspace": max(head, llm.workspace(policy.llm), vit.workspace(policy.vit) - llm.saved(policy.llm)),
    }
    return MemoryEstimate(
        **state_bytes(config, model, world_size),
        **step,
        teacher=teacher_weights * ITEMSIZE[config.kd.dtype or config.model.dtype],
        generation=max(0.0, cache_bytes(config, text, b) - sum(step.values())) if config.kd.on_policy else 0.0,
    )


def cache_bytes(config: Config, text: Any, itemsize: int) -> float:
    """Keys and values of the answers that a rank generates together (kd.on_policy): prompts that fill a pack and are
    equally long, with the longest answers behind them."""
    num_tokens = config.data.pack_tokens + config.kd.on_policy_batch_size * config.kd.on_policy_max_new_tokens
    return 2.0 * itemsize * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * num_tokens


def state_bytes(config: Config, model: Any, world_size: int) -> dict[str, float]:
    """Weights, optimizer and gradients of `MemoryEstimate`: what every family has alike, whatever is in a pack."""
    b = ITEMSIZE[config.model.dtype]
    num_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    bucket = bucket_elements(config.distributed.reduce_bucket_size, model)
    return {
        "weights": float(b * sum(p.numel() for p in model.parameters())),
        "optimizer": 12 * num_trained / world_size,
        "gradients": _gradient_bytes(config, num_trained, bucket, world_size, b),
    }


def is_estimated(hf_config: Any) -> bool:
    """Whether the formulas describe the family's layers: neither linear attention nor experts."""
    family = family_of(hf_config)
    return not (family.linear_attention or family.experts)


def _most_gathered_keys(data: DataSettings) -> float:
    """Tokens of all prefixes and suffixes of a full pack, every prefix counted for each suffix that sees it.

    step: the plan counts every sample for itself, so that all of them fit into a pack, and a prefix stands in two of
    them at least. group: it counts a prefix once, and a pack may be little else than prefixes of max_shared samples.
    """
    most = {"off": 0.0, "step": 1.5, "group": 1.0 + data.max_shared}
    return most[data.share_prefix] * data.pack_tokens


def _gradient_bytes(config: Config, num_trained: int, bucket: int, world_size: int, itemsize: int) -> float:
    """ZeRO-2 keeps a rank's part in float32 and two buckets in the weights' dtype; ZeRO-1 all of them, in both.

    A reduction adds a flat copy of its bucket, and what a rank owns of it in float32, at most all.
    """
    if config.distributed.zero_stage == 2:
        return 4 * num_trained / world_size + (3 * itemsize + 4) * bucket
    return (4 + itemsize) * num_trained + 4 * num_trained / world_size + 2 * 4 * bucket


def _head_bytes(config: Config, text: Any, itemsize: int, *, trained: bool) -> float:
    """Logits of a chunk with the float32 tensors of its losses, and the head's gradient."""
    num_logits = config.loss.chunk_size * text.vocab_size
    copies = itemsize + 4 + itemsize + (itemsize + 4 * 4 if config.loss.kd_weight > 0 else 0)
    return copies * num_logits + (4 + itemsize) * text.vocab_size * text.hidden_size * trained


def recompute_flops(cost: CostModel, config: Config, hf_config: Any, policy: Recomputation) -> float:
    """What a policy computes twice in a full pack."""
    patches, tokens = config.data.pack_patches, config.data.pack_tokens
    vit = patches * (cost.vit_linear + cost.vit_attention * min(patches, LARGEST_IMAGE))
    llm = tokens * (cost.llm_linear + cost.llm_attention * min(tokens, LARGEST_IMAGE // 4) / 2)
    depths = (hf_config.vision_config.depth, hf_config.text_config.num_hidden_layers)
    shares = [
        (-(-depth // every)) / depth if every else 0.0
        for depth, every in zip(depths, (policy.vit, policy.llm), strict=True)
    ]
    return vit * shares[0] + llm * shares[1]


@dataclass(frozen=True)
class MemoryPlan:
    """The recomputation of a run, what it is expected to need, and what there is; bytes."""

    policy: Recomputation
    estimate: MemoryEstimate | None
    available: float

    def applied_to(self, settings: ModelSettings) -> ModelSettings:
        return dataclasses.replace(settings, recompute_vit=self.policy.vit, recompute_llm=self.policy.llm)

    def describe(self) -> str:
        if self.estimate is None:
            return "not estimated for this family"
        return f"{self.estimate.describe()} of {self.available / 1e9:.1f} GB"


def plan_memory(context: RunContext, model: Any, attention: str, teacher_plan: TeacherPlan | None = None) -> MemoryPlan:
    """The recomputation of a run, the same on all ranks. Every rank calls this, after freezing and adapters."""
    config, ranks = context.config, context.ranks
    loaded = ITEMSIZE[config.model.dtype] * sum(p.numel() for p in model.parameters())
    available = available_memory(ranks, loaded)
    return choose_recomputation(
        config,
        model,
        available=available,
        world_size=ranks.world_size,
        attention=attention,
        teacher_weights=teacher_weights(config, model, teacher_plan, ranks.world_size),
    )


def choose_recomputation(
    config: Config,
    model: Any,
    *,
    available: float,
    world_size: int,
    attention: str,
    teacher_weights: float = 0,
) -> MemoryPlan:
    """The policy with the fewest FLOPs whose estimate fits into 90 % of `available` bytes; fields that are set stay.

    Warns where nothing fits. Families whose layers the formulas do not describe (linear attention, experts) recompute
    every layer.
    """
    asked = (config.model.recompute_vit, config.model.recompute_llm)
    if not is_estimated(model.config):
        return MemoryPlan(Recomputation(*(1 if every == AUTO else every for every in asked)), None, available)
    choices = [EVERY if every == AUTO else (every,) for every in asked]
    policies = [Recomputation(vit, llm) for vit, llm in itertools.product(*choices)]
    cost = CostModel.from_config(model.config)
    policies.sort(key=lambda policy: recompute_flops(cost, config, model.config, policy))
    plans = [
        MemoryPlan(
            policy,
            estimate_memory(
                config, model, policy, world_size=world_size, attention=attention, teacher_weights=teacher_weights
            ),
            available,
        )
        for policy in policies
    ]
    fitting = (plan for plan in plans if plan.estimate and plan.estimate.total <= USABLE * available)
    plan = next(fitting, plans[-1])
    if plan.estimate and plan.estimate.total > USABLE * available:
        logger.warning(
            "memory: the estimate is %s; should a pack not fit, lower data.pack_tokens or data.pack_patches, or set "
            "model.recompute_vit=1 model.recompute_llm=1",
            plan.describe(),
        )
    return plan


def available_memory(ranks: Ranks, loaded: float) -> float:
    """Bytes that the rank with the least may use: what is free, and what this process holds already.

    loaded: bytes of the weights that are in host memory already. Every rank calls this.
    """
    if ranks.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(ranks.device)
        mine = float(free + torch.cuda.memory_reserved(ranks.device))
    else:
        mine = psutil.virtual_memory().available / ranks.world_size_per_node + loaded
    return float(ranks.min(torch.tensor(mine, dtype=torch.float64)))


def teacher_weights(config: Config, student: Any, teacher_plan: TeacherPlan | None, world_size: int) -> float:
    """Weights that the teacher keeps on a rank: all, its share of them and the head, or the head alone."""
    if teacher_plan is None:
        return 0.0
    text = teacher_plan.files.config.get_text_config()  # type: ignore[attr-defined]
    head = float(text.vocab_size * text.hidden_size)
    if teacher_plan.targets is not None:
        return 0.0 if config.kd.top_k else head
    if config.kd.path in ("", config.model.path):
        num_weights = sum(p.numel() for name, p in student.named_parameters() if ".lora_" not in name)
    else:
        with torch.device("meta"):
            teacher = AutoModelForImageTextToText.from_config(teacher_plan.files.config)
        num_weights = sum(p.numel() for p in teacher.parameters())
    return num_weights / world_size + head if config.kd.sharding == "zero3" else float(num_weights)
