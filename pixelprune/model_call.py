"""A packed row through the stock model, with sample borders in every layer of its family.

Full-attention layers take borders as host integers or cumulative lengths, stock ones from positions. Linear-attention
layers (Qwen3.5) carry state along the row, and take borders only from compiled kernels. Where those are not at hand,
the row is unpacked into padded batches right here and the result is gathered back, so that packs stay packs everywhere
else.
"""

from __future__ import annotations

import importlib.util
import inspect
import logging
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import is_flash_attention_requested

from pixelprune.attention.carried_state import carried_hidden
from pixelprune.attention.segments import takes_borders
from pixelprune.family import family_of
from pixelprune.pack import Pack, VisionGeometry, model_inputs, row_inputs, vision_inputs

__all__ = ["DELTA_CHUNK", "KERNEL_PACKAGES", "final_hidden", "group_by_length", "image_features", "takes_packed_rows"]

logger = logging.getLogger(__name__)

KERNEL_PACKAGES = {"fla": "flash-linear-attention", "causal_conv1d": "causal-conv1d"}
"""Modules that the stock linear-attention layers look for, and the packages they come from. Both are needed."""
_KERNELS = {
    "fla": ("fla.ops.gated_delta_rule", "chunk_gated_delta_rule", "cu_seqlens"),
    "causal_conv1d": ("causal_conv1d", "causal_conv1d_fn", "seq_idx"),
}
"""Where the kernel of each is, and the argument by which it takes borders."""
DELTA_CHUNK = 64
"""The gated delta rule computes whole chunks of this many tokens, so shorter rows cost the same."""

# L = tokens of the row, S = samples, D = model width; a group = samples that share one padded batch


def final_hidden(
    model: Any, pack: Pack, geometry: VisionGeometry, dtype: torch.dtype | None = None, *, in_one_call: bool = False
) -> torch.Tensor:
    """Final hidden states (L, D) of a pack's tokens, in the order of the row; equal to running its samples apart.

    A picture that the pack encodes once goes through the vision tower once, and its features to every place. Of a
    prefix that samples share there is one state per token. Raises ValueError for a model that cannot share one.
    model: the stock model with its output head; the pack is on its device. dtype: of the pixels, the model's if None.
    in_one_call: pad all samples to the longest instead of grouping them by length. For ranks that share a model's
    layers (ZeRO-3) and must therefore run it equally often.
    """
    dtype = dtype or model.dtype
    if pack.shared and geometry.linear_attention:
        if in_one_call:
            raise ValueError(
                "a row whose samples share a prefix, in a model with linear-attention layers: it takes several calls, "
                "which ranks that share the layers cannot make equally often; pack without groups"
            )
        features = image_features(model, pack, geometry, dtype).pooler_output if pack.num_patches else ()
        return carried_hidden(model, pack, features, group_by_length, _filler(model.config))
    if takes_packed_rows(model):
        inputs = _packed_inputs(model, pack, geometry, dtype)
        if is_flash_attention_requested(model.config):
            # Borders are the cumulative lengths; row 0 would only be searched for them once more, and waited for.
            inputs["position_ids"] = inputs["position_ids"][1:]
        return model.model(**inputs).last_hidden_state[0]
    groups = [list(range(pack.num_samples))] if in_one_call else group_by_length(pack.sample_lens)
    return _unpacked_hidden(model, pack, geometry, dtype, groups)


def _packed_inputs(model: Any, pack: Pack, geometry: VisionGeometry, dtype: torch.dtype) -> dict[str, Any]:
    """`model_inputs`, or the row with the features of its pictures, where each picture is encoded once."""
    if pack.image_order is None:
        return model_inputs(pack, geometry, dtype, with_borders=takes_borders(model))
    inputs = row_inputs(pack, geometry, with_borders=takes_borders(model))
    if not pack.num_patches:
        return inputs
    return inputs | {"mm_encoder_outputs": {"image": image_features(model, pack, geometry, dtype)}}


def image_features(model: Any, pack: Pack, geometry: VisionGeometry, dtype: torch.dtype) -> Any:
    """What the stock vision tower says of the row's images, in their order: one run over those that are encoded.

    A stock output: pooler_output holds features (kept, D) of each image, deepstack_features the same per tapped layer,
    where the family has any. Images of one picture have one tensor in common, in which their gradients meet. The pack
    has an image.
    """
    inputs = vision_inputs(pack, geometry, dtype, with_borders=takes_borders(model))
    output = model.model.get_image_features(**inputs, return_dict=True)
    if pack.image_order is not None:
        output.pooler_output = tuple(output.pooler_output[number] for number in pack.image_order)
        if layers := getattr(output, "deepstack_features", None):
            output.deepstack_features = [tuple(layer[number] for number in pack.image_order) for layer in layers]
    return output


def takes_packed_rows(model: Any) -> bool:
    """Whether the stock model keeps the samples of a packed row apart in all of its layers; said once in the log."""
    family = family_of(model.config)
    return not family.linear_attention or _kernels_take_borders(family.model_type, model.device.type)


@lru_cache
def _kernels_take_borders(model_type: str, device_type: str) -> bool:
    missing = [package for module, package in KERNEL_PACKAGES.items() if not _has_kernel(module)]
    if device_type == "cuda" and not missing:
        logger.info("%s: linear-attention kernels take the borders of packed samples", model_type)
        return True
    why = f"without {' and '.join(missing)}" if missing else f"on {device_type}, where the kernels do not run"
    logger.info(
        "%s: its linear-attention layers take no sample borders %s; packed rows are unpacked into padded batches at "
        "the model call (same results, slower)",
        model_type,
        why,
    )
    return False


def _has_kernel(module: str) -> bool:
    """Whether the module holds its kernel, and the kernel takes borders. A folder of that name proves nothing."""
    if importlib.util.find_spec(module) is None:
        return False
    place, name, argument = _KERNELS[module]
    try:
        kernel = getattr(importlib.import_module(place), name)
    except (ImportError, OSError, RuntimeError, AttributeError) as error:  # built for another torch or CUDA
        logger.warning("%s is installed but does not load: %s", KERNEL_PACKAGES[module], error)
        return False
    if argument in inspect.signature(kernel).parameters:
        return True
    logger.warning(
        "%s is installed, but its %s takes no %s; install a newer one", KERNEL_PACKAGES[module], name, argument
    )
    return False


def group_by_length(lengths: Sequence[int]) -> list[list[int]]:
    """Samples that share a padded batch: in each group none is shorter than half of the longest (chunks rounded up).

    Padding so never more than doubles the row, however uneven its samples are. Groups keep the samples' order.
    """
    chunked = [-(-length // DELTA_CHUNK) for length in lengths]
    groups: list[list[int]] = []
    for sample in sorted(range(len(lengths)), key=lambda sample: -lengths[sample]):
        if groups and 2 * chunked[sample] >= chunked[groups[-1][0]]:
            groups[-1].append(sample)
        else:
            groups.append([sample])
    return [sorted(group) for group in groups]


def _unpacked_hidden(
    model: Any, pack: Pack, geometry: VisionGeometry, dtype: torch.dtype, groups: list[list[int]]
) -> torch.Tensor:
    """`final_hidden` through right-padded batches.

    Every layer is causal, so tokens of a sample see nothing of the padding behind them, and no mask is needed. Padding
    continues the count in row 0 of the positions: a break would be read as a border, and a mask be built for it.
    """
    longest = [max(pack.sample_lens[sample] for sample in group) for group in groups]
    starts = [0, *accumulate(len(group) * length for group, length in zip(groups, longest, strict=True))]
    place = _places(pack, groups, longest, starts)
    ids = pack.input_ids.new_full((starts[-1],), _filler(model.config)).index_copy(0, place, pack.input_ids)
    positions = pack.position_ids.new_zeros((4, starts[-1])).index_copy(1, place, pack.position_ids)
    images = _images_by_sample(model, pack, geometry, dtype)
    hidden = []
    for group, length, (start, stop) in zip(groups, longest, pairwise(starts), strict=True):
        shape = (len(group), length)
        counts = torch.arange(length, device=ids.device).expand(1, *shape)
        mrope = positions[1:, start:stop].view(3, *shape)
        output = model.model(
            input_ids=ids[start:stop].view(shape),
            position_ids=torch.cat([counts, mrope]),
            use_cache=False,
            **_encoded([image for sample in group for image in images[sample]]),
        )
        hidden.append(output.last_hidden_state.flatten(0, 1))
    return torch.cat(hidden).index_select(0, place)


def _places(pack: Pack, groups: list[list[int]], longest: list[int], starts: list[int]) -> torch.Tensor:
    """Index (L,) of every token of the row in the padded batches, laid out behind each other."""
    row_starts = [0] * pack.num_samples
    for group, length, start in zip(groups, longest, starts, strict=False):
        for row, sample in enumerate(group):
            row_starts[sample] = start + row * length
    device = pack.input_ids.device
    lengths = pack.cu_seqlens.diff().to(torch.int64)
    starts_of_rows = torch.tensor(row_starts)
    if device.type == "cuda":
        starts_of_rows = starts_of_rows.pin_memory()
    # Pinned, and output_size is known here, so that nothing waits for the device.
    row_start = starts_of_rows.to(device, non_blocking=True).repeat_interleave(lengths, output_size=pack.num_tokens)
    return row_start + pack.position_ids[0]


def _images_by_sample(model: Any, pack: Pack, geometry: VisionGeometry, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    """Features (kept, D) of each sample's images: the vision tower runs once over all images of the pack."""
    features = image_features(model, pack, geometry, dtype).pooler_output if pack.num_patches else ()
    borders = [0, *accumulate(pack.num_images_per_sample)]
    return [tuple(features[start:stop]) for start, stop in pairwise(borders)]


def _encoded(features: list[torch.Tensor]) -> dict[str, Any]:
    """What the stock forward takes instead of pixels. It has no DeepStack features: no hybrid family has any."""
    return {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=features)}} if features else {}


def _filler(config: Any) -> int:
    """A token to pad with that stands for no image and no video."""
    return next(token for token in range(3) if token not in (config.image_token_id, config.video_token_id))
