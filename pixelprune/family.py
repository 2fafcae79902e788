"""Facts about the supported model families that their configs do not state. One table, no code per family."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """What the input builder must know beyond the Hugging Face config.

    interpolation_mode, align_corners: how the learned position grid of the vision tower is resampled (attributes of
    the stock vision module, checked against it by the seam test).
    """

    model_type: str
    interpolation_mode: str = "bilinear"
    align_corners: bool = True


FAMILIES = {family.model_type: family for family in (Family("qwen3_vl"),)}


def family_of(config) -> Family:
    """The family of a Hugging Face config. Raises ValueError naming the supported ones."""
    try:
        return FAMILIES[config.model_type]
    except KeyError:
        supported = ", ".join(sorted(FAMILIES))
        raise ValueError(
            f"model type {config.model_type!r} is not supported; expected one of: {supported} (model.path)"
        ) from None
