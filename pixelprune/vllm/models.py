"""Stock vLLM models whose images arrive pruned. Registered under the stock architectures' names.

A checkpoint that nothing asks to prune is given to the stock class itself.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.logger import init_logger
from vllm.model_executor.models import qwen3_5, qwen3_vl, qwen3_vl_moe
from vllm.multimodal import MULTIMODAL_REGISTRY

from pixelprune.vllm.encoder import kept_metadata
from pixelprune.vllm.fields import kept_counts, patches_of_fields
from pixelprune.vllm.positions import kept_positions
from pixelprune.vllm.processing import processing_factories
from pixelprune.vllm.refusals import check_server
from pixelprune.vllm.settings import served_settings

logger = init_logger("vllm.pixelprune")


class Pruned:
    """What is in front of a stock class: it takes kept blocks and their mask, and leaves everything else to it."""

    stock: type

    def __new__(cls, *, vllm_config: Any, prefix: str = "") -> Any:
        if served_settings(vllm_config.model_config) is None:
            logger.info("pixelprune: %s is served unpruned; nothing asks for pruning", vllm_config.model_config.model)
            return cls.stock(vllm_config=vllm_config, prefix=prefix)
        return super().__new__(cls)

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        settings = served_settings(vllm_config.model_config)
        assert settings is not None
        check_server(vllm_config, settings)
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        logger.info("pixelprune: %s is served pruned by %s", vllm_config.model_config.model, settings.describe())

    def _parse_and_validate_image_input(self, **kwargs: Any) -> dict[str, Any]:
        if kwargs.get("pixel_values") is None or kwargs.get("image_keep") is None:
            raise ValueError("expected kept blocks with their mask; this model is served pruned")
        names = ("pixel_values", "image_grid_thw", "image_keep")
        return {"type": "pixel_values"} | {name: kwargs[name] for name in names}

    def _process_image_input(self, image_input: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        """Features (kept, D) of each image, by the stock tower over kept patches."""
        visual: Any = self.visual  # type: ignore[attr-defined]
        grids, keep = image_input["image_grid_thw"].tolist(), image_input["image_keep"]
        num_kept = kept_counts(keep, [height * width // visual.spatial_merge_unit for _, height, width in grids])
        patches = patches_of_fields(image_input["pixel_values"], visual.temporal_patch_size)
        features = visual(patches, None, encoder_metadata=kept_metadata(visual, grids, keep, num_kept))
        return features.split(num_kept)

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[torch.Tensor, int]:
        return kept_positions(super().get_mrope_input_positions, input_tokens, mm_features)  # type: ignore[misc]


def _registered(info: type) -> Any:
    return MULTIMODAL_REGISTRY.register_processor(**processing_factories(info))


@_registered(qwen3_vl.Qwen3VLProcessingInfo)
class Qwen3VLForConditionalGeneration(Pruned, qwen3_vl.Qwen3VLForConditionalGeneration):
    stock = qwen3_vl.Qwen3VLForConditionalGeneration


@_registered(qwen3_vl_moe.Qwen3VLMoeProcessingInfo)
class Qwen3VLMoeForConditionalGeneration(Pruned, qwen3_vl_moe.Qwen3VLMoeForConditionalGeneration):
    stock = qwen3_vl_moe.Qwen3VLMoeForConditionalGeneration


@_registered(qwen3_5.Qwen3_5ProcessingInfo)
class Qwen3_5ForConditionalGeneration(Pruned, qwen3_5.Qwen3_5ForConditionalGeneration):  # noqa: N801 - the stock name
    stock = qwen3_5.Qwen3_5ForConditionalGeneration


@_registered(qwen3_5.Qwen3_5MoeProcessingInfo)
class Qwen3_5MoeForConditionalGeneration(Pruned, qwen3_5.Qwen3_5MoeForConditionalGeneration):  # noqa: N801
    stock = qwen3_5.Qwen3_5MoeForConditionalGeneration
