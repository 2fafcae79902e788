"""Shared prefixes and shared pictures in a run: who can, and what is not computed because of them.

What a pack shares is found where it is made (`training.data.worker`); the plan knows nothing of it, so that order and
membership of steps stay what they are without sharing, and the plan's caps and costs are upper bounds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pixelprune.attention.segments import KERNELS
from pixelprune.family import family_of
from pixelprune.flops import CostModel
from pixelprune.pack import Pack
from training.config.settings import ModelSettings
from training.data.balance import PrefixColumns
from training.data.distillation import DistillationPack
from training.data.plan import PlanInput
from training.data.settings import DataSettings
from training.errors import UserError

SHARING_ATTENTIONS = (*KERNELS, "varlen")
"""Attentions, of `training.model.attention`, that show a suffix its prefix."""


@dataclass(frozen=True)
class SavedFlops:
    """What a pack costs less than its samples apart: every prefix once for each sample that does not compute it again,
    and the vision tower for every image whose features are those of an image before it.

    teacher: of an online one, whose rows share the same prefixes. Exact where causal attention is counted by its half,
    as plans do: a suffix sees its prefix either way.
    """

    student: CostModel
    teacher: CostModel | None = None

    def __call__(self, pack: Pack) -> float:
        saved = _saved(self.student, pack, training=True)
        if self.teacher is not None and isinstance(pack, DistillationPack) and pack.full is not None:
            saved += _saved(self.teacher, pack.full, training=False)
        return saved


def _saved(cost: CostModel, pack: Pack, *, training: bool) -> float:
    again = pack.repeated_images
    saved = cost.vision_flops(sum(again), cost.patch_squares(again), training=training)
    return float(saved) + sum(
        (prefix.num_samples - 1)
        * cost.sample_flops(
            kept_blocks=prefix.kept_blocks,
            text_tokens=prefix.num_text_tokens,
            supervised_tokens=0,
            training=training,
        )
        for prefix in pack.shared
    )


def describe_sharing(data: DataSettings, inputs: PlanInput) -> str:
    """The settings, and what there is to share: records that begin alike up to their first image, and records of one
    picture whatever stands before it, with what they weigh."""
    assert inputs.prefixes is not None, "an index gives them"
    assert inputs.pictures is not None, "an index gives them"
    prefixes = (inputs.prefixes, inputs.prefixes.tokens, inputs.tokens)
    pictures = (inputs.pictures, inputs.pictures.patches, inputs.patches)
    parts = [
        _potential("prefix", data.share_prefix, "beginnings up to their first image", "tokens", *prefixes),
        _potential("vision", data.share_vision, "first images", "ViT patches", *pictures),
    ]
    return "; ".join(parts)


def _potential(
    what: str, setting: str, names: str, unit: str, columns: PrefixColumns, sizes: np.ndarray, every: np.ndarray
) -> str:
    _, first, counts = np.unique(columns.group, return_index=True, return_counts=True)
    several = counts > 1
    if not several.any():
        return f"{what} {setting}, no two records share one"
    saved = int(((counts - 1) * sizes[first]).sum())
    return (
        f"{what} {setting}, {int(counts[several].sum())} records have {int(several.sum())} {names}: "
        f"{saved / every.sum():.0%} fewer {unit} if each of these were computed once"
    )


def check_sharing(share_prefix: str, config: Any, attention: str, *, is_sharded: bool = False) -> None:
    """Raises UserError where rows with a shared prefix would be computed wrong, for a model's config and attention.

    is_sharded: ranks hold parts of the model and fetch the others' (kd.sharding=zero3).
    """
    if share_prefix == "off":
        return
    if attention not in SHARING_ATTENTIONS:
        raise UserError(
            f"data.share_prefix={share_prefix}: model.attention={attention} gives every query the keys of its own "
            f"sample alone; set model.attention=varlen or sdpa, or data.share_prefix=off with "
            f"data.share_vision={share_prefix}, which needs no other attention"
        )
    family = family_of(config)
    if family.linear_attention and is_sharded:
        raise UserError(
            f"data.share_prefix={share_prefix}: kd.sharding=zero3 runs a teacher in one call, "
            f"{family.model_type} takes one for each prefix; set kd.sharding=replica, or data.share_prefix=off"
        )


def check_layers_of_prefix(share_prefix: str, config: Any, model: ModelSettings) -> None:
    """Raises UserError where layers would lose what a prefix hands on to its suffixes.

    model: with the recomputation that was chosen.
    """
    family = family_of(config)
    if share_prefix == "off" or not family.linear_attention:
        return
    for setting, value in (("recompute_llm", model.recompute_llm), ("compile", model.compile)):
        if value:
            raise UserError(
                f"data.share_prefix={share_prefix}: {family.model_type} has linear-attention layers, which are handed "
                f"the state of a prefix; with model.{setting}={str(value).lower()} they would lose it; set model."
                f"{setting}={'false' if value is True else 0}, or data.share_prefix=off with "
                f"data.share_vision={share_prefix}, which encodes a picture of several records once"
            )
