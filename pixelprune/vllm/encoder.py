"""Geometry of kept patches for vLLM's vision tower: rows of the full grid, of which the kept ones are taken."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from vllm.model_executor.layers.attention import MMEncoderAttention

from pixelprune.settings import MERGE

# I = images, B = blocks of all images before pruning, P = kept patches


def kept_metadata(
    visual: Any, grids: Sequence[Sequence[int]], keep: torch.Tensor, num_kept: Sequence[int]
) -> dict[str, torch.Tensor | None]:
    """`encoder_metadata` of the stock tower's forward for kept patches at their original 2-D positions.

    grids: full grids in patches (I x [1, height, width]); keep: bool (B,) on the host; num_kept: blocks per image.
    """
    device = visual.device
    rows = keep.repeat_interleave(MERGE**2).nonzero()[:, 0].to(device, non_blocking=True)  # (P,)
    cos, sin = visual.rot_pos_emb(grids)
    borders = np.cumsum([0, *(MERGE**2 * count for count in num_kept)], dtype=np.int32)
    backend = visual.attn_backend
    # Borders as `Qwen3_VisionTransformer.prepare_encoder_metadata` gives them to its attention backend.
    return {
        "pos_embeds": visual.fast_pos_embed_interpolate(grids).index_select(0, rows),
        "rotary_pos_emb_cos": cos.index_select(0, rows),
        "rotary_pos_emb_sin": sin.index_select(0, rows),
        "sequence_lengths": MMEncoderAttention.maybe_compute_seq_lens(backend, borders, device),
        "max_seqlen": torch.tensor(MMEncoderAttention.compute_max_seqlen(backend, borders), dtype=torch.int32),
        "cu_seqlens": MMEncoderAttention.maybe_recompute_cu_seqlens(
            backend,
            borders,
            visual.hidden_size,
            visual.tp_size,
            device,
            fp8_padded_hidden_size=visual.fp8_padded_hidden_size,
        ),
    }
