"""Shared prefixes in a run: who can, and what is not computed because of them.

What a pack shares is found where it is made (`training.data.worker`); the plan knows nothing of it, so that order and
membership of steps stay what they are without sharing, and the plan's caps and costs are upper bounds.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from pixelprune.attention.prefixes import SharedPrefix
from pixelprune.attention.segments import KERNELS
from pixelprune.family import family_of
from pixelprune.flops import CostModel
from pixelprune.pack import Pack
from training.data.distillation import DistillationPack
from training.data.plan import PlanInput
from training.errors import UserError


@dataclass(frozen=True)
class SavedFlops:
    """What a pack costs less than the plan says: every prefix once for each sample that does not compute it again.

    teacher: of an online one, whose rows share the same prefixes. Exact where causal attention is counted by its half,
    as plans do: a suffix sees its prefix either way.
    """

    student: CostModel
    teacher: CostModel | None = None

    def __call__(self, pack: Pack) -> float:
        saved = _saved(self.student, pack.shared, training=True)
        if self.teacher is not None and isinstance(pack, DistillationPack) and pack.full is not None:
            saved += _saved(self.teacher, pack.full.shared, training=False)
        return saved


def _saved(cost: CostModel, prefixes: Iterable[SharedPrefix], *, training: bool) -> float:
    return sum(
        (prefix.num_samples - 1)
        * cost.sample_flops(
            kept_blocks=prefix.kept_blocks,
            text_tokens=prefix.num_text_tokens,
            supervised_tokens=0,
            training=training,
        )
        for prefix in prefixes
    )


def describe_sharing(share_prefix: str, inputs: PlanInput) -> str:
    """The setting, and what there is to share: records that begin alike up to their first image, and what it weighs."""
    assert inputs.prefixes is not None, "an index gives them"
    _, first, counts = np.unique(inputs.prefixes.group, return_index=True, return_counts=True)
    several = counts > 1
    if not several.any():
        return f"{share_prefix}; no two records begin alike up to an image"
    saved = int(((counts - 1) * inputs.prefixes.tokens[first]).sum())
    return (
        f"{share_prefix}; {int(counts[several].sum())} records have {int(several.sum())} beginnings up to their first "
        f"image, {saved / inputs.tokens.sum():.0%} fewer tokens if each of these were computed once"
    )


def check_sharing(share_prefix: str, config: Any, attention: str) -> None:
    """Raises UserError where rows with a shared prefix would be computed wrong, for a model's config and attention."""
    if share_prefix == "off":
        return
    family = family_of(config)
    if family.linear_attention:
        raise UserError(
            f"data.share_prefix={share_prefix}: {family.model_type} has linear-attention layers, whose state runs "
            "along the row and not from a prefix into several suffixes; set data.share_prefix=off"
        )
    if attention not in KERNELS:
        raise UserError(
            f"data.share_prefix={share_prefix}: model.attention={attention} gives every query the keys of its own "
            f"sample alone; set model.attention={KERNELS[0]}, or data.share_prefix=off"
        )
