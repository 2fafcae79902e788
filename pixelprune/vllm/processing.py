"""vLLM's front end: images are sized and pruned here, because the scheduler must know the number of placeholders."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.feature_extraction_utils import BatchFeature
from vllm.model_executor.models.qwen3_vl import (
    Qwen3VLDummyInputsBuilder,
    Qwen3VLMultiModalProcessor,
    Qwen3VLProcessingInfo,
)
from vllm.multimodal.hasher import MultiModalHasher
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import ImageProcessorItems, ImageSize
from vllm.multimodal.processing import PromptReplacement, PromptUpdateDetails

from pixelprune.pack import VisionGeometry
from pixelprune.settings import BLOCK, MERGE
from pixelprune.vllm.fields import image_fields, kept_counts
from pixelprune.vllm.metrics import observe_request
from pixelprune.vllm.pictures import as_trained, picture_of
from pixelprune.vllm.positions import check_positions
from pixelprune.vllm.settings import KEY, ServedSettings, of_request, served_settings

MAX_ASPECT_RATIO = 200
"""Beyond it images are refused, by the stock image processor and by ours."""


class PrunedProcessingInfo(Qwen3VLProcessingInfo):
    """What vLLM asks about a model before it sees an image; in front of a family's own class, with its config."""

    settings: ServedSettings

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None, "video": 0}  # training refuses videos, too

    def parse_mm_data(self, mm_data: Any, *, validate: bool = True) -> Any:
        """Every request passes here before anything converts its pictures."""
        if "image" in mm_data:
            mm_data = {**mm_data, "image": as_trained(mm_data["image"], self.settings.resize)}
        return super().parse_mm_data(mm_data, validate=validate)

    def get_image_size_with_most_features(self, max_pixels: int | None = None) -> ImageSize:
        return super().get_image_size_with_most_features(max_pixels or self.settings.resize.max_pixels)

    def get_max_image_tokens(self) -> int:
        size = self.get_image_size_with_most_features()
        # No side falls below one block, so a thin picture can exceed max_pixels.
        thin = math.isqrt(MAX_ASPECT_RATIO * (self.settings.resize.max_pixels // BLOCK**2))
        return max(size.width * size.height // BLOCK**2, thin)

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        return {"image": self.get_max_image_tokens(), "video": 0}


class PrunedDummyInputsBuilder(Qwen3VLDummyInputsBuilder):
    """Images that memory is measured on: noise, of which every block is kept. The stock ones are white: one block."""

    def _get_dummy_images(
        self, *, width: int, height: int, num_images: int, overrides: Any = None
    ) -> list[Image.Image]:
        white = super()._get_dummy_images(width=width, height=height, num_images=num_images, overrides=overrides)
        if not white:
            return []
        pixels = np.random.default_rng(0).integers(0, 256, (white[0].height, white[0].width, 3), dtype=np.uint8)
        return [Image.fromarray(pixels)] * num_images


@dataclass
class KeptPlaceholders(PromptUpdateDetails):
    """The placeholders of one image, with its size in blocks before pruning."""

    grid: tuple[int, int] = (0, 0)


class PrunedProcessor(Qwen3VLMultiModalProcessor):
    """Images -> kept blocks, keep mask and as many placeholders as blocks were kept."""

    info: PrunedProcessingInfo
    _measures_memory = False

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, object]) -> BatchFeature:
        from pixelprune.images.image import prune_image  # numba must not load before vLLM's CPU worker has started

        settings = self._settings_of(hf_kwargs)
        items = mm_items.get("image")
        if not items:
            return BatchFeature()
        if not isinstance(items, ImageProcessorItems):
            raise ValueError(
                "image embeddings stand for all blocks of an image; this model is served pruned, give images"
            )
        pictures = [picture_of(image, number) for number, image in enumerate(items.get_all(), start=1)]
        images = [prune_image(picture, settings.prune, settings.resize) for picture in pictures]
        return BatchFeature(image_fields(images, self._normalisation(), self.info.ctx.model_config.dtype))

    def _normalisation(self) -> VisionGeometry | None:
        """Where pixels are normalised in the front end, how; None where the device does it."""
        if self.info.ctx.get_mm_config().mm_device_do_normalize:
            return None
        stock = self.info.get_image_processor()
        mean_and_std = {"image_mean": stock.image_mean, "image_std": stock.image_std}
        return VisionGeometry.from_config(self.info.get_hf_config(), mean_and_std)

    def _settings_of(self, hf_kwargs: Mapping[str, object]) -> ServedSettings:
        unknown = set(hf_kwargs) - {KEY}
        if unknown:
            raise ValueError(
                f"mm_processor_kwargs: {', '.join(sorted(unknown))} would size or normalise images otherwise than the "
                f"model was trained with; expected {KEY!r} only"
            )
        return of_request(self.info.settings, hf_kwargs[KEY]) if KEY in hf_kwargs else self.info.settings

    def get_dummy_mm_inputs(self, *args: Any, **kwargs: Any) -> Any:
        self._measures_memory = True
        try:
            return super().get_dummy_mm_inputs(*args, **kwargs)
        finally:
            self._measures_memory = False

    def _maybe_apply_prompt_updates(self, mm_items: Any, mm_res: Any) -> Any:
        """Every request passes here, its images from the cache too."""
        images = [update.content for updates in mm_res.prompt_updates.get("image", ()) for update in updates]
        if images and not self._measures_memory:
            model_config = self.info.ctx.model_config
            rope_positions = model_config.hf_config.text_config.max_position_embeddings
            check_positions([(len(i.full), i.grid) for i in images], model_config.max_model_len, rope_positions)
            observe_request(sum(len(i.full) for i in images), sum(math.prod(i.grid) for i in images))
        return super()._maybe_apply_prompt_updates(mm_items, mm_res)

    def _get_mm_hashes(self, inputs: Any) -> dict[str, list[str]]:
        """The stock hashes know the image and the request, not the server's settings; caches may be shared."""
        hashes = dict(super()._get_mm_hashes(inputs))
        identity = self._settings_of(inputs.hf_processor_mm_kwargs).identity()
        algorithm = self.info.ctx.get_mm_config().mm_hasher_algorithm
        hashes["image"] = [
            MultiModalHasher.hash_kwargs(algorithm, mm_hash=mm_hash, pixelprune=identity)
            for mm_hash in hashes.get("image", [])
        ]
        return hashes

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        if "image_keep" not in hf_inputs:
            return {}
        num_blocks = hf_inputs["image_grid_thw"].prod(-1) // MERGE**2
        kept = torch.tensor(kept_counts(hf_inputs["image_keep"], num_blocks.tolist()))
        return {
            "pixel_values": MultiModalFieldConfig.flat_from_sizes("image", kept),
            "image_grid_thw": MultiModalFieldConfig.batched("image", keep_on_cpu=True),
            "image_keep": MultiModalFieldConfig.flat_from_sizes("image", num_blocks, keep_on_cpu=True),
        }

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: Any
    ) -> Sequence[PromptReplacement]:
        image_token_id = self.info.get_hf_config().image_token_id

        def kept_placeholders(item: int) -> KeptPlaceholders:
            fields = out_mm_kwargs["image"][item]
            _, height, width = fields["image_grid_thw"].data.tolist()
            num_kept = int(fields["image_keep"].data.sum())
            return KeptPlaceholders([image_token_id] * num_kept, grid=(height // MERGE, width // MERGE))

        return [PromptReplacement(modality="image", target=[image_token_id], replacement=kept_placeholders)]


def processing_factories(stock_info: type[Qwen3VLProcessingInfo]) -> dict[str, Any]:
    """Arguments of vLLM's `register_processor` that decide per checkpoint: pruned, or the stock classes."""
    pruned_info = type(f"Pruned{stock_info.__name__}", (PrunedProcessingInfo, stock_info), {})

    def info(ctx: Any) -> Qwen3VLProcessingInfo:
        settings = served_settings(ctx.model_config)
        if settings is None:
            return stock_info(ctx)
        pruned = pruned_info(ctx)
        pruned.settings = settings
        return pruned

    def dummy_inputs(made: Qwen3VLProcessingInfo) -> Qwen3VLDummyInputsBuilder:
        pruned = isinstance(made, PrunedProcessingInfo)
        return PrunedDummyInputsBuilder(made) if pruned else Qwen3VLDummyInputsBuilder(made)

    def processor(made: Qwen3VLProcessingInfo, dummies: Qwen3VLDummyInputsBuilder) -> Qwen3VLMultiModalProcessor:
        pruned = isinstance(made, PrunedProcessingInfo)
        return PrunedProcessor(made, dummies) if pruned else Qwen3VLMultiModalProcessor(made, dummies)

    return {"processor": processor, "info": info, "dummy_inputs": dummy_inputs}
