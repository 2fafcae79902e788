"""The DeepSpeed engine around the trained module: its JSON, generated from the config, and what is checked of it."""

from __future__ import annotations

import logging
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import nn
from transformers import PreTrainedModel

from pixelprune.model_call import takes_packed_rows
from training.config.rules import check_passthrough
from training.config.settings import DistributedSettings, OptimSettings
from training.distributed.engine_protocol import Engine
from training.distributed.fragments import create_moments, own_fragments
from training.distributed.ranks import Ranks
from training.errors import UserError
from training.model.parameters import parameter_groups

logger = logging.getLogger(__name__)

BUCKET_OF_ONE_RANK = 2**19
"""Elements, 2 MB: a CPU that reduces nothing gains nothing from more at once."""


def bucket_elements(wanted: int, model: nn.Module) -> int:
    """Elements of ZeRO's gradient bucket: those `wanted`, but room for every gradient that others follow in backward.

    DeepSpeed (0.19.8) copies gradients of up to this size into the bucket. A larger one it reduces where it lies, and
    frees it before the reduction stream has read it: the rest of backward allocates into that memory meanwhile. The
    head of an untied model (622 million elements with 151,936 tokens of width 4,096) is the first gradient of backward.
    That of the token embedding, a tied head with it, is the last: the end of a backward waits, so it may go alone. Not
    so where the vision tower runs before the embedding (hybrid models without kernels): there it counts like any other.

    The price are two buffers of 1.2 GB instead of 0.4 GB. Without overlap nothing would be enlarged, but every
    reduction would stand in the way: 0.8 s a micro-step for 8 billion weights at 50 GB/s.
    """
    stock = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    last = stock.get_input_embeddings().weight if stock is not None and takes_packed_rows(stock) else None
    trained = [p for p in model.parameters() if p.requires_grad]
    largest = max((p.numel() for p in trained if p is not last), default=0)
    # More than all gradients would be reserved for nothing, with adapters 0.8 GB of it.
    return max(min(wanted, sum(p.numel() for p in trained)), largest)


def deepspeed_json(
    distributed: DistributedSettings,
    device: torch.device,
    *,
    dtype: str,
    max_grad_norm: float,
    reduce_bucket_size: int = 0,
    is_alone: bool = False,
) -> dict[str, Any]:
    """DeepSpeed's settings, generated. Raises ConfigError for a passthrough that is not allowed.

    reduce_bucket_size: `bucket_elements` of the model, or what the setting says.
    is_alone: of one rank. On a CPU its gradients then stay where backward left them: with nothing to reduce, a bucket
    and the copy behind it would be two more sets of gradients in the step's peak. What is left is a copy of a bucket.

    Buckets, for models of 2 to 8 billion weights in bfloat16: 200 million elements are 0.4 GB, twice (one fills while
    the other is reduced), 1 % of an 80 GB device; DeepSpeed's 500 million would be 2 GB. A backward makes 11 to 44 of
    them, each long enough for full bandwidth (an all-reduce takes 16 ms at 50 GB/s, against backwards of a second).
    Embeddings of 151,936 tokens are 311 to 622 million elements and go alone at any size, without a buffer, so larger
    buckets would not spare them anything; being last, nothing hides them.

    A bucket is all-reduced, and every rank keeps its part of the result: twice the traffic of a reduction to the
    owners. `use_multi_rank_bucket_allreduce: false` would be that, but stops the host once per owner in every bucket.

    Overlap is safe for gradients that are copied into a bucket (read in DeepSpeed 0.19.8): before a reduction is
    queued, the compute stream waits for those queued before it, so that the buffer it fills next has been read; the
    float32 sums are made on the reduction stream, and the end of a backward waits. Others: `bucket_elements`.
    """
    check_passthrough(distributed.deepspeed)
    on_cpu = device.type == "cpu"
    # ZeRO-1 has no other way than the copy.
    copies_gradients = not (is_alone and on_cpu and distributed.zero_stage == 2)
    bucket = reduce_bucket_size or distributed.reduce_bucket_size
    generated: dict[str, Any] = {
        # The loop decides where an optimizer step ends and scales losses itself: these two only satisfy DeepSpeed.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_grad_norm,
        "zero_optimization": {
            "stage": distributed.zero_stage,
            "overlap_comm": not on_cpu,
            "contiguous_gradients": copies_gradients,
            "reduce_bucket_size": bucket if copies_gradients else min(bucket, BUCKET_OF_ONE_RANK),
            "allgather_bucket_size": 2 * -(-distributed.reduce_bucket_size // 2),  # it must be even
        },
        "bf16": {"enabled": dtype == "bfloat16"},
        # bf16 accumulation is off by 0.24 % in the gradient norm after 64 micro-steps.
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
    }
    passed_on = dict(distributed.deepspeed)
    zero = generated["zero_optimization"] | passed_on.pop("zero_optimization", {})
    return generated | {"zero_optimization": zero} | passed_on


def build_engine(
    module: nn.Module, ranks: Ranks, distributed: DistributedSettings, optim: OptimSettings, dtype: str
) -> Engine:
    """The engine around `module`, in training mode, with AdamW over the recipe's parameter groups.

    dtype: of the module's weights, float32 or bfloat16.
    Every rank calls this. Raises UserError when a checkpoint of this engine would not hold its weights.
    """
    # `from_pretrained` hands models out in evaluation mode, in which the stock layers silently skip recomputation.
    module.train()
    groups = parameter_groups(module, optim)
    optimizer = torch.optim.AdamW(
        groups,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        fused=True,
    )
    settings = deepspeed_json(
        distributed,
        ranks.device,
        dtype=dtype,
        max_grad_norm=optim.max_grad_norm,
        reduce_bucket_size=bucket_elements(distributed.reduce_bucket_size, module),
        is_alone=ranks.world_size == 1,
    )
    if ranks.is_first:
        stage, backend = distributed.zero_stage, torch.distributed.get_backend()
        logger.info("starting DeepSpeed's engine: ZeRO-%d over %d ranks, %s", stage, ranks.world_size, backend)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
    if not isinstance(engine.optimizer, DeepSpeedZeroOptimizer):
        raise UserError(
            f"distributed.zero_stage: expected DeepSpeed to take its ZeRO-1/2 optimizer, got "
            f"{type(engine.optimizer).__name__}, whose state cannot be saved by name; set distributed.zero_stage=2"
        )
    create_moments(engine)
    _check_layout(engine, ranks)
    _check_rotary(engine.module)
    return engine


def _check_rotary(module: nn.Module) -> None:
    """Raises UserError where DeepSpeed rounded the rotary frequencies with the weights, as 0.18 does: angles at long
    positions would be off by radians."""
    for name, buffer in module.named_buffers():
        if name.endswith("inv_freq") and buffer.dtype != torch.float32:
            raise UserError(
                f"{name}: expected float32 after deepspeed.initialize, got {buffer.dtype}; install deepspeed>=0.19.8"
            )


@torch.no_grad()
def _check_layout(engine: Engine, ranks: Ranks) -> None:
    """Whether the pieces of all ranks are the trained parameters, each element once; every rank calls this.

    Raises UserError: another layout than the one read in DeepSpeed would save weights under wrong names.
    """
    parameters = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
    num_right = 0
    for fragment in own_fragments(engine):
        weight = fragment.tensors["weight"]
        own = parameters[fragment.name].flatten()[fragment.start : fragment.start + len(weight)]
        if own.shape == weight.shape and ((own == weight) | own.isnan()).all():
            num_right += len(weight)
    total = int(ranks.sum(torch.tensor(num_right)))
    num_trained = sum(parameter.numel() for parameter in parameters.values())
    if total != num_trained:
        raise UserError(
            f"deepspeed {deepspeed.__version__}: only {total} of {num_trained} trained weights lie where a "
            "checkpoint would look for them; use a version that pyproject.toml allows"
        )
