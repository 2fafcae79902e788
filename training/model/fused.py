"""Optional fused kernels of liger-kernel (Hsu et al. 2024) in one model's own layers; model.liger switches them on.

RMSNorm and SwiGLU keep less for backward (no float32 copy, no silu) and read memory fewer times. Liger's ready-made
`apply_liger_kernel_to_...` functions exchange classes and functions of transformers for the whole process, teacher and
evaluation included; here its public autograd functions are put behind the forward of this model's instances. Rotary
embeddings stay stock: the attention calls a function of its module, which cannot be exchanged for one model. The loss
has its own chunked head (`training.loss.chunked_head`).
"""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

import torch
from torch import nn

from pixelprune.family import family_of
from training.errors import UserError

logger = logging.getLogger(__name__)


def check_fused(device: torch.device, model_type: str) -> None:
    """Raises UserError, before anything is loaded, where the kernels cannot run."""
    if device.type != "cuda":
        raise UserError(f"model.liger: the kernels need a GPU, this is {device.type}; set model.liger=false")
    if importlib.util.find_spec("liger_kernel") is None:
        raise UserError("model.liger: the package liger-kernel is not installed (pip install liger-kernel)")
    if model_type != "qwen3_vl":
        raise UserError(f"model.liger: known for the layers of qwen3_vl, not of {model_type}; set model.liger=false")


def use_fused(model: Any, device: torch.device) -> dict[str, int]:
    """Exchange the forward of this model's RMSNorm and SwiGLU layers; returns and logs how many of each.

    Raises UserError without a GPU, without the package, and for other families.
    """
    check_fused(device, family_of(model.config).model_type)
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return put_in(model, LigerRMSNormFunction.apply, LigerSiLUMulFunction.apply)


def put_in(model: Any, rms_norm: Any, silu_mul: Any) -> dict[str, int]:
    """rms_norm(x, weight, eps, offset, casting_mode, in_place) and silu_mul(gate, up) into every such layer."""
    counts = {"RMSNorm": 0, "SwiGLU": 0}
    for name, module in model.model.language_model.named_modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = _rms_norm_forward(module, rms_norm)
            counts["RMSNorm"] += 1
        elif name.endswith(".mlp"):
            if module.config.hidden_act != "silu":
                raise UserError(f"model.liger: expected silu in the MLP, the model has {module.config.hidden_act}")
            module.forward = _swiglu_forward(module, silu_mul)
            counts["SwiGLU"] += 1
    assert all(counts.values()), f"the stock model's layers have other names: {counts}"
    logger.info("fused kernels of liger-kernel: %s", ", ".join(f"{number} {name}" for name, number in counts.items()))
    return counts


def _rms_norm_forward(norm: nn.Module, rms_norm: Any):
    def forward(hidden_states: torch.Tensor) -> torch.Tensor:
        # llama: float32 inside, rounded before the weight, as stock. Not in place: the gradient that comes in may be
        # the residual's too.
        return rms_norm(hidden_states, norm.weight, norm.variance_epsilon, 0.0, "llama", False)

    return forward


def _swiglu_forward(mlp: nn.Module, silu_mul: Any):
    def forward(x: torch.Tensor) -> torch.Tensor:
        return mlp.down_proj(silu_mul(mlp.gate_proj(x), mlp.up_proj(x)))

    return forward
