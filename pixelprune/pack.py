"""Samples in one row, and exactly what the stock model's forward takes for that row.

The same builder serves training, teacher, evaluation and inference, so they cannot drift apart.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Self

import numpy as np
import torch

from pixelprune.attention.borders import Borders
from pixelprune.attention.prefixes import Group, Piece, SharedPrefix, groups_apart, pieces_of, row_borders
from pixelprune.extras import INFERENCE, TRAINING, require_transformers
from pixelprune.images.distinct import distinct_images
from pixelprune.images.geometry import VisionGeometry, vision_fields
from pixelprune.images.image import PrunedImage
from pixelprune.images.patches import normalised_patches
from pixelprune.sample import Sample
from pixelprune.settings import MERGE

__all__ = [
    "Pack",
    "VisionGeometry",
    "decoding_index",
    "model_inputs",
    "normalise_blocks",
    "pack_samples",
    "row_inputs",
    "row_pictures",
    "vision_inputs",
]

# L = tokens of the row, S = samples, I = images, K = kept blocks, P = 4 K = ViT patches, N = supervised tokens


@dataclass(frozen=True)
class Pack:
    """One packed row, as CPU (or moved) tensors.

    input_ids int64 (L,); position_ids int64 (4, L): row 0 counts 0..n-1 in every sample (a gap would be read as a
    border), rows 1-3 are MRoPE of the unpruned sequences; cu_seqlens int32 (S+1,) sample borders, those of the
    segments where samples share a prefix; max_seqlen: tokens of the longest sample.
    cu_seqlens_k int32 (S+1,): the same of the keys that each sees, other ones where samples share a prefix.
    blocks uint8 (K, 32, 32, 3); block_index int64 (K',) or None: when set, row i of the vision tower's input is
    blocks[block_index[i]] (the decoder of an exact strategy: Proposition 1).
    vit_position_ids int64 (P, 2), vit_interp_indices int64 (P, 4), vit_interp_weights float32 (P, 4): rows of the
    original grid for the kept patches; vit_cu_seqlens int32 (I+1,) image borders in patches.
    borders, vit_borders: which tokens see which, and which patches, as host integers.
    logit_index int64 (N,): positions whose logits predict a supervised token; labels int64 (N,): those tokens;
    weights float32 (N,): what the loss of each is multiplied with, all 1 unless is_weighted; loss_weight: their sum.
    Per sample, with what it shares: num_supervised_per_sample, sample_lens, num_images_per_sample, record_ids, and
    num_kept_blocks, num_full_blocks summed over samples. num_images_per_segment: in the order of the row, those of a
    shared prefix once. shared: the prefixes that stand in the row once for several.
    image_order: of each image in the row, which of those in blocks and vit_* gives its features, where a picture of
    several places would be encoded once; None where every image is encoded within the stock forward.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    cu_seqlens_k: torch.Tensor
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
    num_images_per_segment: tuple[int, ...]
    record_ids: tuple[str, ...]
    num_kept_blocks: int
    num_full_blocks: int
    borders: Borders
    vit_borders: Borders
    shared: tuple[SharedPrefix, ...] = ()
    image_order: tuple[int, ...] | None = None
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
    def repeated_images(self) -> tuple[int, ...]:
        """Kept blocks of each image in the row whose features are those of an image encoded before it."""
        order = self.image_order or ()
        is_first = (number not in order[:place] for place, number in enumerate(order))
        lengths = self.vit_borders.lengths
        return tuple(lengths[n] // (MERGE * MERGE) for n, first in zip(order, is_first, strict=True) if not first)

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


def pack_samples(
    samples: list[Sample],
    geometry: VisionGeometry,
    groups: Sequence[Group] | None = None,
    *,
    pictures: Sequence[int] | None = None,
) -> Pack:
    """Put samples behind each other in one row. Raises ValueError for an empty list.

    groups: samples that share a prefix (`attention.prefixes.find_groups`), which then stands in the row once; None
    shares nothing. What is supervised stays in the order of the samples either way.
    pictures: of each image in the row the number of its picture (`row_pictures`): one that stands in several places is
    encoded once. None encodes every image. Ranks must agree on one of the two, whatever is in their packs: the vision
    tower runs before the rest of the model or within it, and their gradients meet in the order of the backward pass.
    """
    if not samples:
        raise ValueError("a pack needs at least one sample; a rank without work gets a dummy sample")
    groups = groups_apart(len(samples)) if groups is None else groups
    pieces = pieces_of(samples, groups)
    borders = row_borders(pieces)
    starts = [0, *accumulate(borders.lengths)]
    encoded, image_order = _encoded_once([samples[sample].images[n] for sample, n in _places(pieces)], pictures)
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
        cu_seqlens_k=torch.tensor([0, *accumulate(borders.key_lengths)], dtype=torch.int32),
        max_seqlen=max(map(len, samples)),
        logit_index=torch.from_numpy(logit_index),
        labels=torch.from_numpy(ids[logit_index + 1]),
        weights=torch.from_numpy(np.concatenate([sample.supervised_weights for sample in samples])),
        is_weighted=any(sample.weights is not None for sample in samples),
        loss_weight=sum(sample.loss_weight for sample in samples),
        num_supervised_per_sample=tuple(sample.num_supervised for sample in samples),
        sample_lens=tuple(map(len, samples)),
        num_images_per_sample=tuple(len(sample.images) for sample in samples),
        num_images_per_segment=tuple(piece.images[1] - piece.images[0] for piece in pieces),
        record_ids=tuple(sample.record_id for sample in samples),
        num_kept_blocks=sum(image.selection.num_kept for sample in samples for image in sample.images),
        num_full_blocks=sum(image.num_full_blocks for sample in samples for image in sample.images),
        borders=borders,
        shared=tuple(SharedPrefix.of_group(samples, group) for group in groups if len(group.members) > 1),
        image_order=image_order,
        **vision_fields(encoded, geometry),
    )


def _encoded_once(
    images: list[PrunedImage], pictures: Sequence[int] | None
) -> tuple[list[PrunedImage], tuple[int, ...] | None]:
    """The images that are encoded, and `Pack.image_order`."""
    if pictures is None:
        return images, None
    first = dict(zip(reversed(pictures), reversed(images), strict=True))
    return [first[number] for number in range(len(first))], tuple(pictures)


def row_pictures(samples: list[Sample], groups: Sequence[Group] | None = None) -> tuple[int, ...]:
    """Of each image in the row of `pack_samples`, in order, the number of its picture: what `pictures` takes there."""
    pieces = pieces_of(samples, groups_apart(len(samples)) if groups is None else groups)
    return distinct_images([(samples[sample].images, n) for sample, n in _places(pieces)])


def _places(pieces: list[Piece]) -> list[tuple[int, int]]:
    """(sample, its image's number) of every image in the row."""
    return [(piece.sample, n) for piece in pieces for n in range(*piece.images)]


def decoding_index(
    samples: list[Sample], groups: Sequence[Group] | None = None, pictures: Sequence[int] | None = None
) -> torch.Tensor:
    """`Pack.block_index` of the full images: for every place in order, which of the row's kept blocks stands there.

    int64 (all blocks,), for the row that `pack_samples` makes of the same samples, groups and pictures. Exact for
    recoverable strategies (`registry.is_recoverable`, Proposition 1), across the images of a sample too.
    """
    pieces = pieces_of(samples, groups_apart(len(samples)) if groups is None else groups)
    row = _places(pieces)
    numbers_of_row = range(len(row)) if pictures is None else pictures
    first = dict(zip(reversed(numbers_of_row), reversed(row), strict=True))
    encoded = [first[number] for number in range(len(first))]
    starts_of_pictures = list(accumulate((samples[s].images[n].selection.num_kept for s, n in encoded), initial=0))
    starts = {place: starts_of_pictures[number] for number, place in zip(numbers_of_row, row, strict=True)}
    # Who brings a prefix's images to the row, for every sample that shares it.
    owners = {piece.sample: pieces[piece.prefix].sample for piece in pieces if piece.prefix is not None}
    parts = [np.empty(0, dtype=np.int64)]
    for sample, n in encoded:
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
    pack: Pack, geometry: VisionGeometry, dtype: torch.dtype, *, with_borders: bool = False, as_blocks: bool = False
) -> dict[str, Any]:
    """The keyword arguments of the stock forward for a pack that is on its device already.

    Pixels are scaled, normalised and their frame duplicated here, in `dtype`. `use_cache=False` always: with a cache
    the packed mask is not built and samples leak into each other. Nothing in here waits for the device.
    with_borders: hand on the host integers too, for models whose attention reads them
    (`pixelprune.attention.segments.takes_borders`); any other would drop them without a word.
    as_blocks: leave pixels as uint8 blocks, for models that normalise them
    (`pixelprune.images.patch_embed.take_blocks`).
    Raises ValueError for a row that only such attention keeps apart, without with_borders, and for one whose pictures
    are encoded once: their features go in through `pixelprune.model_call.final_hidden`.
    A family with linear-attention layers takes these inputs only where its compiled kernels are installed and raises
    otherwise; `pixelprune.model_call.final_hidden` runs it anywhere.
    """
    if pack.image_order is not None:
        raise ValueError(
            "a row whose pictures are encoded once: expected a call through pixelprune.model_call.final_hidden"
        )
    inputs = row_inputs(pack, geometry, with_borders=with_borders)
    return inputs | vision_inputs(pack, geometry, dtype, with_borders=with_borders, as_blocks=as_blocks)


def row_inputs(pack: Pack, geometry: VisionGeometry, *, with_borders: bool = False) -> dict[str, Any]:
    """The part of `model_inputs` that concerns tokens; placeholders of images wait for their features."""
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
        "cu_seq_lens_k": pack.cu_seqlens_k,
        "max_length_q": pack.max_seqlen,
        "max_length_k": pack.max_seqlen,
        "use_cache": False,
    }
    if geometry.linear_attention:
        inputs["seq_idx"] = _sample_of_token(pack)[None]
    if with_borders:
        inputs["row_borders"] = pack.borders
    return inputs


def _sample_of_token(pack: Pack) -> torch.Tensor:
    """int32 (L,): the number of the sample that each token belongs to."""
    samples = torch.arange(pack.num_samples, dtype=torch.int32, device=pack.input_ids.device)
    return samples.repeat_interleave(pack.cu_seqlens.diff().to(torch.int64), output_size=pack.num_tokens)


def vision_inputs(
    pack: Pack, geometry: VisionGeometry, dtype: torch.dtype, *, with_borders: bool = False, as_blocks: bool = False
) -> dict[str, Any]:
    """The part of `model_inputs` that concerns images, those that are encoded; empty for a pack without one."""
    if pack.num_patches == 0:
        return {}
    require_transformers(INFERENCE, "pruned images in the stock model")
    blocks = pack.blocks if pack.block_index is None else pack.blocks[pack.block_index]
    patches_per_image = pack.vit_cu_seqlens.diff().to(torch.int64)
    ones = torch.ones_like(patches_per_image)
    borders = {"image_borders": pack.vit_borders} if with_borders else {}
    return borders | {
        "pixel_values": blocks if as_blocks else normalise_blocks(blocks, geometry).to(dtype),
        # Used by the model only to split features by image: 1 x 2 x (2 * kept) patches.
        "image_grid_thw": torch.stack([ones, MERGE * ones, patches_per_image // MERGE], dim=1),
        "image_position_ids": pack.vit_position_ids,
        "image_interp_indices": pack.vit_interp_indices,
        "image_interp_weights": pack.vit_interp_weights,
        "image_cu_seqlens": pack.vit_cu_seqlens,
        "image_max_seqlen": pack.vit_max_seqlen,
    }


def normalise_blocks(blocks: torch.Tensor, geometry: VisionGeometry) -> torch.Tensor:
    """uint8 blocks (K, 32, 32, 3) to float32 patches (4 K, 3 * temporal * 256), as the HF processor gives them."""
    return normalised_patches(blocks, geometry.image_mean, geometry.image_std, geometry.temporal_patch)


def _predictors(sample: Sample) -> np.ndarray:
    """Positions in the sample whose logits predict a supervised token."""
    assert not sample.supervised[0], f"record {sample.record_id!r}: nothing precedes its first token to predict it from"
    return np.flatnonzero(sample.supervised) - 1
