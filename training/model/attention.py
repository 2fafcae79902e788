"""Which attention runs: chosen once, said in the log, and the same for the vision tower and the language model.

    T = tokens (or patches) of a row, S = its samples (or images), H / H_kv = heads of queries / keys, E = head width

What "auto" takes, the first that can run:

    flash_attention_3, flash_attention_2   where the package is installed (GPU, bfloat16 or float16)
    varlen                                 `torch.nn.attention.varlen`: torch's own flash kernels over rows with borders
    sdpa                                   anywhere, once per sample and image (`pixelprune.attention.segments`)

The first three take sample borders as cumulative lengths: one call per layer for a whole row, whatever is in it; a
prefix that samples share is gathered in front of each for varlen, and refused for flash-attn. None
builds an (L, L) mask for a packed row; `eager`, the definition for comparisons, runs per sample too.

varlen is registered with transformers as `flash_varlen`: a name with "flash" in it makes the stock vision tower hand
over the borders of all images at once instead of looping over them.
"""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch before 2.10
    varlen_attn = None
from pixelprune.attention.borders import Borders
from pixelprune.attention.gathered import gather_keys
from pixelprune.attention.segments import KERNELS, mask_beside_borders, use_borders
from pixelprune.images.patch_embed import use_linear_patches
from training.config.settings import ATTENTION_NAMES
from training.errors import UserError
from training.model.weights import load_whole

logger = logging.getLogger(__name__)

_PACKAGES = {"flash_attention_3": "flash-attn-3", "flash_attention_2": "flash-attn"}
_MODULES = {"flash_attention_3": "flash_attn_interface", "flash_attention_2": "flash_attn"}
_REGISTERED = "flash_varlen"
_HALF = (torch.bfloat16, torch.float16)
_MIN_CAPABILITY = (8, 0)  # torch's flash kernels: Ampere and later


def choose_attention(requested: str, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> str:
    """The attention to load a model with, one of ATTENTION_NAMES without "auto"; said in the log.

    dtype: of the weights and activations. Raises UserError for a request that this machine cannot serve.
    """
    if requested not in ATTENTION_NAMES:
        raise UserError(f"model.attention: expected one of {', '.join(ATTENTION_NAMES)}, got {requested!r}")
    if requested != "auto":
        if reason := obstacle(requested, device, dtype):
            raise UserError(f"model.attention={requested}: {reason}; set model.attention=auto or sdpa")
        logger.info("attention: %s, as the recipe says", requested)
        return requested
    skipped = []
    for name in ("flash_attention_3", "flash_attention_2", "varlen"):
        # Without a GPU varlen is a reference for tests, slower than sdpa.
        reason = "it needs a GPU" if device.type != "cuda" else obstacle(name, device, dtype)
        if not reason:
            logger.info("attention: %s", name)
            return name
        skipped.append(f"{name}: {reason}")
    logger.info("attention: sdpa (%s)", "; ".join(skipped) if device.type == "cuda" else f"device {device.type}")
    return "sdpa"


def attention_for(dtype: torch.dtype, device: torch.device, attention: str) -> str:
    """The attention of a second model (a teacher) beside one with `attention`: sdpa where its dtype rules that out."""
    if attention != "auto" and obstacle(attention, device, dtype):
        logger.info("attention of the %s model: sdpa", str(dtype).removeprefix("torch."))
        return "sdpa"
    return attention


def load_pretrained(
    path: str, *, attention: str, dtype: torch.dtype, trust_remote_code: bool = False, allow_pickle: bool = False
) -> PreTrainedModel:
    """The stock model of a folder or hub id, on the CPU, with an attention that `choose_attention` gave.

    Raises UserError for weights that are not whole (`training.model.weights`).
    """
    model = load_whole(
        path,
        dtype=dtype,
        # transformers takes any "flash" name for a kernel package and tries to import it: varlen is set afterwards.
        attention="sdpa" if attention == "varlen" else attention,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
    )
    use_attention(model, attention)
    use_linear_patches(model)
    return model


def use_attention(model: PreTrainedModel, attention: str) -> None:
    """Switch a stock model to an attention that `choose_attention` gave; flash-attn's names were set as it was made."""
    if attention == "varlen":
        use_varlen(model)
    elif attention in KERNELS:
        use_borders(model, attention)


def use_varlen(model: PreTrainedModel) -> None:
    """Switch this model, vision tower and language model, to varlen attention. No class and no other model changes."""
    AttentionInterface.register(_REGISTERED, varlen_attention)
    AttentionMaskInterface.register(_REGISTERED, mask_beside_borders)
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            part.config._attn_implementation = _REGISTERED


def varlen_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    row_borders: Borders | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers calls it: query (B, H, T, E), key and value (B, H_kv, T, E), result (B, T, H, E).

    A row with borders (B = 1, cu_seq_lens int32 (S + 1,)) runs through torch's varlen kernel on CUDA, and on any other
    device through `reference_varlen`, which is written from the definition for tests. A batch without borders (padded
    training batches of hybrid models, generation) is no varlen problem and runs through sdpa.
    row_borders: of the samples of a token row, which reach the vision tower too and are not read there. Where samples
    share a prefix, keys and values are gathered for every segment, and cu_seq_lens_k are the borders of those.

    Raises UserError for float32 on CUDA, ValueError for a packed row without borders, for borders without maxima and
    for those of another row.
    """
    causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
    if cu_seq_lens_q is None:
        if attention_mask is not None and attention_mask.ndim == 1:
            raise ValueError(_NO_BORDERS)
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=causal, **kwargs
        )
    if query.shape[0] != 1 or query.shape[2] != key.shape[2] or max_length_q is None or max_length_k is None:
        raise ValueError(
            "varlen attention: expected one packed row without a cache, cu_seq_lens_q/k and max_length_q/k, got "
            f"query {tuple(query.shape)}, key {tuple(key.shape)}, max_length_q={max_length_q}; see pack.model_inputs"
        )
    if dropout:
        raise ValueError(f"varlen attention has no dropout, the model asks for {dropout}; use model.attention=sdpa")
    # (1, H, T, E) -> (T, H, E)
    q, k, v = (row[0].transpose(0, 1) for row in (query, key, value))
    if causal and row_borders is not None and not row_borders.are_apart:
        if row_borders.num_tokens != query.shape[2] or cu_seq_lens_k is None:
            raise ValueError(
                f"varlen attention: expected cu_seq_lens_k and borders of a row of {query.shape[2]} tokens, got "
                f"{row_borders.num_tokens}; take them from one pack (pack.model_inputs)"
            )
        k, v = gather_keys(k, row_borders), gather_keys(v, row_borders)
        max_length_q, max_length_k = max(row_borders.lengths), max(row_borders.key_lengths)
    if query.is_cuda:
        out = _cuda_varlen(q, k, v, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, scaling, causal)
    else:
        out = reference_varlen(q, k, v, cu_seq_lens_q, cu_seq_lens_k, scaling=scaling, is_causal=causal)
    return out.unsqueeze(0), None


@torch.compiler.disable  # its loop would be unrolled: a version for every number of segments
def reference_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    borders: torch.Tensor,
    key_borders: torch.Tensor | None = None,
    *,
    scaling: float | None,
    is_causal: bool,
) -> torch.Tensor:
    """Attention (T, H, E) within each segment, from the definition: softmax(Q K^T * scaling) V, one after the other.

    query (T, H, E), key and value (M, H_kv, E); borders (S + 1,) reaches from 0 to T, key_borders, those of the queries
    if None, from 0 to M. Causal: query i of n sees keys 0 .. m - n + i of m, aligned at the lower right, as flash
    kernels have it (torch's documents do not say; `attention_check` looks). Waits for the device and loops over
    segments: for tests, on the CPU.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    group = query.shape[1] // key.shape[1]
    segments = []
    own, seen = (pairwise(edges.tolist()) for edges in (borders, borders if key_borders is None else key_borders))
    for (start, stop), (first, last) in zip(own, seen, strict=True):
        q = query[start:stop].transpose(0, 1)  # (H, n, E)
        k, v = (x[first:last].transpose(0, 1).repeat_interleave(group, dim=0) for x in (key, value))
        scores = (q @ k.transpose(1, 2)).float() * scaling
        if is_causal:
            n, m = stop - start, last - first
            future = torch.ones(n, m, dtype=torch.bool, device=q.device).triu(m - n + 1)
            scores = scores.masked_fill(future, -torch.inf)
        segments.append((scores.softmax(-1).to(v.dtype) @ v).transpose(0, 1))
    return torch.cat(segments)


_NO_BORDERS = (
    "varlen attention: a packed row came without cu_seq_lens_q/k and max_length_q/k, its samples would see each other; "
    "call the model through pixelprune.model_call.final_hidden or with pixelprune.pack.model_inputs"
)


def _cuda_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    borders_q: torch.Tensor,
    borders_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    scaling: float | None,
    is_causal: bool,
) -> torch.Tensor:
    """One kernel for the whole row; nothing waits for the device."""
    if query.dtype not in _HALF:
        raise UserError(_NEEDS_HALF.format(query.dtype))
    return varlen_attn(
        query,
        key,
        value,
        borders_q,
        borders_q if borders_k is None else borders_k,
        max_q,
        max_k,
        scale=scaling,
        window_size=(-1, 0) if is_causal else (-1, -1),
        # Where there is no such flag, as in torch 2.11, the kernel groups heads by itself.
        **({"enable_gqa": query.shape[1] != key.shape[1]} if "enable_gqa" in _VARLEN_PARAMETERS else {}),
    )


_NEEDS_HALF = "flash kernels compute in bfloat16 or float16, not {}; set model.dtype=bfloat16 or model.attention=sdpa"


def obstacle(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """Why this attention cannot run here; "" where it can."""
    if name in ("sdpa", "eager"):
        return ""
    if name == "varlen":
        if device.type != "cuda":
            return ""  # the reference
        if not _has_varlen():
            return "this torch has no torch.nn.attention.varlen with a scale and a window (2.11 and later have)"
        capability = torch.cuda.get_device_capability(device)
        if capability < _MIN_CAPABILITY:
            return f"this GPU has compute capability {capability[0]}.{capability[1]}, the kernels need 8.0"
        if not torch.backends.cuda.is_flash_attention_available():
            return "this torch was built without flash kernels"
    else:
        if device.type != "cuda":
            return f"it needs a GPU, this is {device.type}"
        is_installed = is_flash_attn_3_available if name == "flash_attention_3" else is_flash_attn_2_available
        # transformers would fetch a kernel from the hub in its place.
        if name not in AttentionInterface() or not is_installed():
            return f"the package {_PACKAGES[name]} is not installed, or this transformers does not know it"
        if problem := _import_problem(_MODULES[name]):
            return f"the package {_PACKAGES[name]} is installed but does not load: {problem}"
    return "" if dtype in _HALF else _NEEDS_HALF.format(dtype)


def _import_problem(module: str) -> str:
    """Why a module cannot be imported, as a wheel built for another torch cannot; "" where it can."""
    try:
        importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        return str(error)
    return ""


def _parameters_of(function: Callable[..., Any] | None) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters) if function else frozenset()


_VARLEN_PARAMETERS = _parameters_of(varlen_attn)
"""What this torch's kernel takes: looked at once, since a layer's forward may be compiled. Versions say less: builds
between releases, and backports, have one argument and not another."""


def _has_varlen() -> bool:
    return {"scale", "window_size"} <= _VARLEN_PARAMETERS
