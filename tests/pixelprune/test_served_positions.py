"""Positions and fields of served prompts against those of trained samples. No vLLM is needed for them."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pixelprune.images.image import prune_pixels
from pixelprune.pack import VisionGeometry, normalise_blocks, pack_samples
from pixelprune.sample import ChatTokens, build_sample
from pixelprune.settings import PruneSettings
from pixelprune.vllm.fields import image_fields, kept_counts, patches_of_fields
from pixelprune.vllm.positions import check_positions, kept_positions
from tests.conftest import screen

IMAGE = 6


@dataclass(frozen=True)
class Place:
    offset: int
    length: int


@dataclass(frozen=True)
class Feature:
    mm_position: Place
    data: dict
    modality: str = "image"


def grid_rule(tokens: list[int], features: list[Feature]) -> tuple[torch.Tensor, int]:
    """Qwen3-VL's rule from its definition, over a prompt with all blocks: text counts on, an image is a grid."""
    positions, position, cut = [], 0, 0
    for feature in features:
        _, height, width = feature.data["image_grid_thw"].data.tolist()
        rows, cols = height // 2, width // 2
        start = feature.mm_position.offset
        positions += [(position + i,) * 3 for i in range(start - cut)]
        position += start - cut
        positions += [(position, position + r, position + c) for r in range(rows) for c in range(cols)]
        position += max(rows, cols)
        cut = start + feature.mm_position.length
    positions += [(position + i,) * 3 for i in range(len(tokens) - cut)]
    return torch.tensor(positions).T, 0


def make_images(*shapes: tuple[int, int]):
    return [prune_pixels(screen(*shape, seed), PruneSettings(), (0, 0)) for seed, shape in enumerate(shapes)]


def features_of(images, ids: np.ndarray) -> list[Feature]:
    fields = image_fields(images, None, torch.float32)
    num_blocks = (fields["image_grid_thw"].prod(-1) // 4).tolist()
    keeps = fields["image_keep"].split(num_blocks)
    starts = np.flatnonzero((ids == IMAGE) & (np.roll(ids, 1) != IMAGE)).tolist()
    lengths = kept_counts(fields["image_keep"], num_blocks)
    data = [
        {"image_keep": SimpleNamespace(data=keep), "image_grid_thw": SimpleNamespace(data=grid)}
        for keep, grid in zip(keeps, fields["image_grid_thw"], strict=True)
    ]
    return [Feature(Place(*place), d) for *place, d in zip(starts, lengths, data, strict=True)]


@pytest.mark.parametrize("shapes", [[(3, 7)], [(9, 2), (4, 4)], [(1, 1), (5, 6), (1, 8)], []])
def test_served_positions_are_the_trained_ones(shapes):
    images = make_images(*shapes)
    ids = np.array([1, 9] + [token for _ in images for token in (IMAGE, 8)] + [4, 5, 7], dtype=np.int64)
    sample = build_sample(ChatTokens(ids, np.zeros(len(ids), dtype=bool)), images, image_token_id=IMAGE)
    features = features_of(images, sample.input_ids) if images else []
    positions, delta = kept_positions(grid_rule, sample.input_ids.tolist(), features[::-1])
    assert np.array_equal(positions.numpy(), sample.position_ids)
    assert delta + len(sample) == sample.next_position


def test_a_feature_without_a_mask_is_refused():
    feature = Feature(Place(0, 1), {}, "video")
    with pytest.raises(ValueError, match="video: expected an image with its keep mask"):
        kept_positions(grid_rule, [IMAGE], [feature])


def test_pixels_of_both_ways_are_those_of_a_training_pack(toy_tokenizer, geometry):
    from tests.pixelprune.reference import make_sample

    images = make_images((3, 5), (4, 4))
    raw = patches_of_fields(image_fields(images, None, torch.float32)["pixel_values"], geometry.temporal_patch)
    sent = patches_of_fields(image_fields(images, geometry, torch.float32)["pixel_values"], geometry.temporal_patch)
    sample = make_sample(toy_tokenizer, [screen(3, 5, 0), screen(4, 4, 1)], "Where?", "Here")
    trained = normalise_blocks(pack_samples([sample], geometry).blocks, geometry)
    assert torch.equal(sent, trained)
    # On the device vLLM scales and normalises in one multiplication and one addition.
    device = raw.float() / 255 / 0.5 - 1
    torch.testing.assert_close(device, trained, atol=1e-6, rtol=0)
    assert isinstance(geometry, VisionGeometry)


def test_positions_stay_within_the_rotary_table():
    busy, blank = (500, (34, 60)), (1, (34, 60))
    check_positions([busy, blank, blank], 1000, 1000)  # tokens are ahead all the time
    check_positions([blank, busy], 941, 1000)
    with pytest.raises(ValueError, match=r"run 59 ahead of tokens.*--max-model-len 941 or less"):
        check_positions([blank, busy], 942, 1000)
    with pytest.raises(ValueError, match="run 118 ahead"):
        check_positions([blank, blank, busy], 1000, 1000)
