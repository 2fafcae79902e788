"""Samples in one row, and exactly what the stock model's forward takes for that row.

The same builder serves training, teacher, evaluation and inference, so they cannot drift apart.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any, Self

import numpy as np
import torch
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

from pixelprune.attention.borders import Borders
from pixelprune.attention.prefixes import Group, Piece, SharedPrefix, groups_apart, pieces_of, row_borders
from pixelprune.extras import INFERENCE, TRAINING, require_transformers
from pixelprune.family import family_of
from pixelprune.images.image import PrunedImage
from pixelprune.sample import Sample
from pixelprune.settings import BLOCK, MERGE, PATCH

__all__ = [
    "Pack",
    "VisionGeometry",
    "decoding_index",
    "model_inputs",
    "normalise_blocks",
    "pack_samples",
    "vision_inputs",
]

# L = tokens of the row, S = samples, I = images, K = kept blocks, P = 4 K = ViT patches, N = supervised tokens


@dataclass(frozen=True)
class VisionGeometry:
    """What the builder needs to know of a model: the vision tower's grid, the pixel normalisation, and whether the
    language model has linear-attention layers, whose convolution takes sample borders as `seq_idx`."""

    image_token_id: int
    num_grid_per_side: int
    interpolation_mode: str
    align_corners: bool
    temporal_patch: int = 2
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)
    linear_attention: bool = False

    @classmethod
    def from_config(cls, config: Any, preprocessor: dict[str, Any] | None = None) -> VisionGeometry:
        """From a Hugging Face model config and, if at hand, the content of its preprocessor_config.json.

        Raises ValueError for an unsupported family or for patch sizes other than 16 with a merge of 2.
        """
        family, vision = family_of(config), config.vision_config
        if (vision.patch_size, vision.spatial_merge_size) != (PATCH, MERGE):
            raise ValueError(
                f"expected ViT patches of {PATCH} merged {MERGE}x{MERGE}, got patch_size={vision.patch_size}, "
                f"spatial_merge_size={vision.spatial_merge_size} in the model's config"
            )
        preprocessor = preprocessor or {}
        return cls(
            image_token_id=config.image_token_id,
            num_grid_per_side=int(vision.num_position_embeddings**0.5),
            interpolation_mode=family.interpolation_mode,
            align_corners=family.align_corners,
            temporal_patch=vision.temporal_patch_size,
            image_mean=tuple(preprocessor.get("image_mean", cls.image_mean)),
            image_std=tuple(preprocessor.get("image_std", cls.image_std)),
            linear_attention=family.linear_attention,
        )


@dataclass(frozen=True)
class Pack:
    """One packed row, as CPU (or moved) tensors.

    input_ids int64 (L,); position_ids int64 (4, L): row 0 counts 0..n-1 in every sample (a gap would be read as a
    border), rows 1-3 are MRoPE of the unpruned sequences; cu_seqlens int32 (S+1,) sample borders, those of the
    segments where samples share a prefix; max_seqlen: tokens of the longest sample.
    blocks uint8 (K, 32, 32, 3); block_index int64 (K',) or None: when set, row i of the vision tower's input is
    blocks[block_index[i]] (the decoder of an exact strategy: Proposition 1).
    vit_position_ids int64 (P, 2), vit_interp_indices int64 (P, 4), vit_interp_weights float32 (P, 4): rows of the
    original grid for the kept patches; vit_cu_seqlens int32 (I+1,) image borders in patches.
    borders, vit_borders: which tokens see which, and which patches, as host integers.
    logit_index int64 (N,): positions whose logits predict a supervised token; labels int64 (N,): those tokens;
    weights float32 (N,): what the loss of each is multiplied with, all 1 unless is_weighted; loss_weight: their sum.
    Per sample, with what it shares: num_supervised_per_sample, sample_lens, num_images_per_sample, record_ids, and
    num_kept_blocks, num_full_blocks summed over samples. shared: the prefixes that stand in the row once for several.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int
    blocks: torch.Tensor
    vit_position_ids: torch.Tensor
    vit_interp_indices: torch.Tensor
    vit_interp_weights: torch.Tensor
    vit_cu_seqlens: torch.Tensor
    vit_max_seqlen: int
    logit_index: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    is_weighted: bool
    loss_weight: float
    num_supervised_per_sample: tuple[int, ...]
    sample_lens: tuple[int, ...]
    num_images_per_sample: tuple[int, ...]
    record_ids: tuple[str, ...]
    num_kept_blocks: int
    num_full_blocks: int
    borders: Borders
    vit_borders: Borders
    shared: tuple[SharedPrefix, ...] = ()
    block_index: torch.Tensor | None = None

    @property
    def num_samples(self) -> int:
        return len(self.record_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens that are computed: those of a shared prefix once."""
        return len(self.input_ids)

    @property
    def num_shared_tokens(self) -> int:
        """Tokens that are not computed, since a prefix stands in the row once."""
        return sum(self.sample_lens) - self.num_tokens

    @property
    def num_patches(self) -> int:
        """ViT patches that are computed: those of a shared image once."""
        return len(self.vit_position_ids)

    @property
    def num_supervised(self) -> int:
        return len(self.labels)

    @property
    def num_full_tokens(self) -> int:
        """Tokens the same samples would have without pruning, each for itself."""
        return sum(self.sample_lens) - self.num_kept_blocks + self.num_full_blocks

    def tensors(self) -> Iterator[torch.Tensor]:
        """Everything that moves to the device."""
        values = (getattr(self, f.name) for f in dataclasses.fields(self))
        yield from (value for value in values if isinstance(value, torch.Tensor))

    def mapped(self, move: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        """The same pack with every tensor replaced by move(tensor)."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return dataclasses.replace(self, **{k: move(v) for k, v in values.items() if isinstance(v, torch.Tensor)})

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        return self.mapped(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """Called by torch's DataLoader."""
        return self.mapped(lambda tensor: tensor.pin_memory())


def pack_samples(samples: list[Sample], geometry: VisionGeometry, groups: Sequence[Group] | None = None) -> Pack:
    """Put samples behind each other in one row. Raises ValueError for an empty list.

    groups: samples that share a prefix (`attention.prefixes.find_groups`), which then stands in the row once; None
    shares nothing. What is supervised stays in the order of the samples either way.
    """
    if not samples:
        raise ValueError("a pack needs at least one sample; a rank without work gets a dummy sample")
    groups = groups_apart(len(samples)) if groups is None else groups
    pieces = pieces_of(samples, groups)
    borders = row_borders(pieces)
    starts = [0, *accumulate(borders.lengths)]
    images = [image for piece in pieces for image in _images_of(samples, piece)]
    ids = np.concatenate([samples[piece.sample].input_ids[piece.start : piece.stop] for piece in pieces])
    row_positions = np.concatenate([np.arange(piece.start, piece.stop) for piece in pieces])
    mrope = np.concatenate(
        [samples[piece.sample].position_ids[:, piece.start : piece.stop] for piece in pieces], axis=1
    )
    # Nothing in a prefix predicts a supervised token, so that a sample's predictors are in its last piece.
    shifts = {piece.sample: start - piece.start for piece, start in zip(pieces, starts, strict=False)}
    logit_index = np.concatenate([_predictors(sample) + shifts[number] for number, sample in enumerate(samples)])
    return Pack(
        input_ids=torch.from_numpy(ids),
        position_ids=torch.from_numpy(np.concatenate([row_positions[None], mrope])),
        cu_seqlens=torch.tensor(starts, dtype=torch.int32),
        max_seqlen=max(map(len, samples)),
        logit_index=torch.from_numpy(logit_index),
        labels=torch.from_numpy(ids[logit_index + 1]),
        weights=torch.from_numpy(np.concatenate([sample.supervised_weights for sample in samples])),
        is_weighted=any(sample.weights is not None for sample in samples),
        loss_weight=sum(sample.loss_weight for sample in samples),
        num_supervised_per_sample=tuple(sample.num_supervised for sample in samples),
        sample_lens=tuple(map(len, samples)),
        num_images_per_sample=tuple(len(sample.images) for sample in samples),
        record_ids=tuple(sample.record_id for sample in samples),
        num_kept_blocks=sum(image.selection.num_kept for sample in samples for image in sample.images),
        num_full_blocks=sum(image.num_full_blocks for sample in samples for image in sample.images),
        borders=borders,
        shared=tuple(SharedPrefix.of_group(samples, group) for group in groups if len(group.members) > 1),
        **_vision_fields(images, geometry),
    )


def _images_of(samples: list[Sample], piece: Piece) -> list[PrunedImage]:
    return samples[piece.sample].images[slice(*piece.images)]


def decoding_index(samples: list[Sample], groups: Sequence[Group] | None = None) -> torch.Tensor:
    """`Pack.block_index` of the full images: for every place in order, which of the row's kept blocks stands there.

    int64 (all blocks,), for the row that `pack_samples` makes of the same samples and groups. Exact for recoverable
    strategies (`registry.is_recoverable`, Proposition 1), across the images of a sample too.
    """
    pieces = pieces_of(samples, groups_apart(len(samples)) if groups is None else groups)
    row: list[tuple[int, int]] = [(piece.sample, n) for piece in pieces for n in range(*piece.images)]
    kept = [samples[sample].images[n].selection.num_kept for sample, n in row]
    starts = dict(zip(row, accumulate(kept, initial=0), strict=False))
    # Who brings a prefix's images to the row, for every sample that shares it.
    owners = {piece.sample: pieces[piece.prefix].sample for piece in pieces if piece.prefix is not None}
    parts = [np.empty(0, dtype=np.int64)]
    for sample, n in row:
        images, owner = samples[sample].images, owners.get(sample, sample)
        selection = images[n].selection
        numbers = np.full(selection.source.shape, n) if selection.image is None else selection.image
        places = np.empty(selection.source.shape, dtype=np.int64)
        for other in np.unique(numbers).tolist():
            here = numbers == other
            rank_of_kept = np.cumsum(images[other].selection.keep.ravel()) - 1
            start = starts[(sample, other) if (sample, other) in starts else (owner, other)]
            places[here] = start + rank_of_kept[selection.source[here]]
        parts.append(places.ravel())
    return torch.from_numpy(np.concatenate(parts))


def model_inputs(
    pack: Pack, geometry: VisionGeometry, dtype: torch.dtype, *, with_borders: bool = False
) -> dict[str, Any]:
    """The keyword arguments of the stock forward for a pack that is on its device already.

    Pixels are scaled, normalised and their frame duplicated here, in `dtype`. `use_cache=False` always: with a cache
    the packed mask is not built and samples leak into each other. Nothing in here waits for the device.
    with_borders: hand on the host integers too, for models whose attention reads them
    (`pixelprune.attention.segments.takes_borders`); any other would drop them without a word.
    Raises ValueError for a row that only such attention keeps apart, without with_borders.
    A family with linear-attention layers takes these inputs only where its compiled kernels are installed and raises
    otherwise; `pixelprune.model_call.final_hidden` runs it anywhere.
    """
    require_transformers(TRAINING, "a packed row in the stock model")
    if not with_borders and not pack.borders.are_apart:
        raise ValueError(
            "a row whose samples share a prefix: expected attention that reads borders; "
            "switch the model with pixelprune.attention.segments.use_borders"
        )
    inputs = {
        "input_ids": pack.input_ids[None],
        "position_ids": pack.position_ids[:, None],
        "cu_seq_lens_q": pack.cu_seqlens,
        "cu_seq_lens_k": pack.cu_seqlens,
        "max_length_q": pack.max_seqlen,
        "max_length_k": pack.max_seqlen,
        "use_cache": False,
    }
    if geometry.linear_attention:
        inputs["seq_idx"] = _sample_of_token(pack)[None]
    if with_borders:
        inputs["row_borders"] = pack.borders
    return inputs | vision_inputs(pack, geometry, dtype, with_borders=with_borders)


def _sample_of_token(pack: Pack) -> torch.Tensor:
    """int32 (L,): the number of the sample that each token belongs to."""
    samples = torch.arange(pack.num_samples, dtype=torch.int32, device=pack.input_ids.device)
    return samples.repeat_interleave(pack.cu_seqlens.diff().to(torch.int64), output_size=pack.num_tokens)


def vision_inputs(
    pack: Pack, geometry: VisionGeometry, dtype: torch.dtype, *, with_borders: bool = False
) -> dict[str, Any]:
    """The part of `model_inputs` that concerns images; empty for a pack without one."""
    if pack.num_patches == 0:
        return {}
    require_transformers(INFERENCE, "pruned images in the stock model")
    blocks = pack.blocks if pack.block_index is None else pack.blocks[pack.block_index]
    patches_per_image = pack.vit_cu_seqlens.diff().to(torch.int64)
    ones = torch.ones_like(patches_per_image)
    borders = {"image_borders": pack.vit_borders} if with_borders else {}
    return borders | {
        "pixel_values": normalise_blocks(blocks, geometry).to(dtype),
        # Used by the model only to split features by image: 1 x 2 x (2 * kept) patches.
        "image_grid_thw": torch.stack([ones, MERGE * ones, patches_per_image // MERGE], dim=1),
        "image_position_ids": pack.vit_position_ids,
        "image_interp_indices": pack.vit_interp_indices,
        "image_interp_weights": pack.vit_interp_weights,
        "image_cu_seqlens": pack.vit_cu_seqlens,
        "image_max_seqlen": pack.vit_max_seqlen,
    }


def normalise_blocks(blocks: torch.Tensor, geometry: VisionGeometry) -> torch.Tensor:
    """uint8 blocks (K, 32, 32, 3) to float32 patches (4 K, 3 * temporal * 256), in the HF processor's layout.

    Every uint8 value has one float32 image under scale and normalise, so a table looked up per channel gives the HF
    processor's bits on any device: it multiplies by 1/255 in float64, rounds to float32, then normalises in float32.
    """
    table = _normalisation_table(geometry.image_mean, geometry.image_std, blocks.device)
    channel_offset = torch.arange(0, 3 * 256, 256, dtype=torch.int32, device=blocks.device).view(3, 1, 1)
    values = table[_by_patch(blocks).to(torch.int32) + channel_offset]
    return _twice(values, geometry.temporal_patch)


def patches_of_blocks(blocks: torch.Tensor, temporal_patch: int) -> torch.Tensor:
    """uint8 blocks (K, 32, 32, 3) to uint8 patches (4 K, 3 * temporal * 256), in the HF processor's layout."""
    return _twice(_by_patch(blocks), temporal_patch)


def _by_patch(blocks: torch.Tensor) -> torch.Tensor:
    """(K, 32, 32, 3) to (K, 2, 2, 3, 16, 16): the patches of a block, row by row, channels first."""
    return blocks.view(len(blocks), MERGE, PATCH, MERGE, PATCH, 3).permute(0, 1, 3, 5, 2, 4)


def _twice(patches: torch.Tensor, temporal_patch: int) -> torch.Tensor:
    """(K, 2, 2, 3, 16, 16) to (4 K, 3 * temporal * 256): an image is a video whose frames are all the same."""
    frames = patches.unsqueeze(4).expand(-1, -1, -1, -1, temporal_patch, -1, -1)
    return frames.reshape(len(patches) * MERGE * MERGE, 3 * temporal_patch * PATCH * PATCH)


@lru_cache(maxsize=8)
def _normalisation_table(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> torch.Tensor:
    scaled = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
    per_channel = [(scaled - np.float32(m)) / np.float32(s) for m, s in zip(mean, std, strict=True)]
    return torch.from_numpy(np.concatenate(per_channel)).to(device)


def _predictors(sample: Sample) -> np.ndarray:
    """Positions in the sample whose logits predict a supervised token."""
    assert not sample.supervised[0], f"record {sample.record_id!r}: nothing precedes its first token to predict it from"
    return np.flatnonzero(sample.supervised) - 1


def _vision_fields(images: list[PrunedImage], geometry: VisionGeometry) -> dict[str, Any]:
    if not images:
        return {
            "blocks": torch.empty(0, BLOCK, BLOCK, 3, dtype=torch.uint8),
            "vit_position_ids": torch.empty(0, 2, dtype=torch.int64),
            "vit_interp_indices": torch.empty(0, 4, dtype=torch.int64),
            "vit_interp_weights": torch.empty(0, 4, dtype=torch.float32),
            "vit_cu_seqlens": torch.zeros(1, dtype=torch.int32),
            "vit_max_seqlen": 0,
            "vit_borders": Borders([], is_causal=False),
        }
    grids = [_kept_rows(image.selection.keep, geometry) for image in images]
    num_patches = [len(positions) for positions, _, _ in grids]
    return {
        "blocks": torch.from_numpy(np.concatenate([image.blocks for image in images])),
        "vit_position_ids": torch.cat([positions for positions, _, _ in grids]),
        "vit_interp_indices": torch.cat([indices for _, indices, _ in grids]),
        "vit_interp_weights": torch.cat([weights for _, _, weights in grids]),
        "vit_cu_seqlens": torch.tensor([0, *accumulate(num_patches)], dtype=torch.int32),
        "vit_max_seqlen": max(num_patches),
        "vit_borders": Borders.of_lengths(num_patches, is_causal=False),
    }


def _kept_rows(keep: np.ndarray, geometry: VisionGeometry) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Position and interpolation rows of the kept patches, taken from those of the full grid."""
    full = _full_grid(keep.shape, geometry)
    kept_patches = torch.from_numpy(keep.reshape(-1)).repeat_interleave(MERGE * MERGE)
    return tuple(rows[kept_patches] for rows in full)


@lru_cache(maxsize=64)
def _full_grid(shape: tuple[int, int], geometry: VisionGeometry) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All rows of a grid of blocks, from the stock helpers. Screenshots come in few sizes, so they are remembered."""
    grid_thw = torch.tensor([[1, shape[0] * MERGE, shape[1] * MERGE]])
    indices, weights = get_vision_interpolation_indices_and_weights(
        grid_thw,
        num_grid_per_side=geometry.num_grid_per_side,
        mode=geometry.interpolation_mode,
        align_corners=geometry.align_corners,
        spatial_merge_size=MERGE,
    )
    return get_vision_position_ids(grid_thw, MERGE), indices, weights
