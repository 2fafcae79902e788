"""The baselines random, conncomp and resize as prune settings: at PixelPrune's budget wherever images are pruned."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from pixelprune.hf import generate, prepare
from pixelprune.images.image import prune_image, prune_pixels
from pixelprune.pack import model_inputs, pack_samples
from pixelprune.selection.registry import is_recoverable
from pixelprune.settings import PruneSettings, ResizeSettings
from tests.conftest import screen
from tests.pixelprune.reference import make_sample

BASELINES = ("random", "conncomp", "conncomp_cover", "resize")
SMALL = ResizeSettings(min_pixels=1024)
MESSAGES = [
    {"role": "user", "content": [{"type": "image", "image": screen(6, 9)}, {"type": "text", "text": "Where is it?"}]}
]


def largest_downscale(height: int, width: int, budget: int) -> tuple[int, int]:
    """Of all scales 1, 0.999, ... the first whose rounded sides hold at most `budget` blocks."""
    for thousandth in range(1000, 0, -1):
        s = thousandth / 1000
        rows, cols = max(1, round(height * s / 32)), max(1, round(width * s / 32))
        if rows * cols <= budget:
            return rows, cols
    raise AssertionError("even one block is too much")


@pytest.mark.parametrize(("metric", "threshold"), [("max", 0.0), ("mae", 0.05)])
def test_resize_scales_with_pillow_to_the_blocks_that_pred2d_keeps(metric, threshold):
    pixels = screen(10, 16, seed=3)
    settings = {"metric": metric, "threshold": threshold}
    budget = prune_pixels(pixels, PruneSettings("pred2d", **settings), (320, 512)).selection.num_kept
    image = prune_pixels(pixels, PruneSettings("resize", **settings), (320, 512))
    rows, cols = image.selection.keep.shape
    assert (rows, cols) == largest_downscale(320, 512, budget)
    assert image.selection.keep.all()
    assert rows * cols <= budget
    scaled = np.asarray(Image.fromarray(pixels).resize((32 * cols, 32 * rows), Image.Resampling.BICUBIC))
    for number, block in enumerate(image.blocks):
        row, col = divmod(number, cols)
        assert np.array_equal(block, scaled[32 * row : 32 * row + 32, 32 * col : 32 * col + 32])
    assert image.original_size == (320, 512)


@pytest.mark.parametrize("strategy", BASELINES)
def test_every_baseline_is_within_the_budget_and_counts_the_full_image(strategy):
    picture = Image.fromarray(screen(9, 12, seed=1))
    budget = prune_image(picture, PruneSettings(), SMALL).selection.num_kept
    image = prune_image(picture, PruneSettings(strategy), SMALL)
    assert image.num_full_blocks == 9 * 12
    kept = image.selection.num_kept
    assert kept == budget if strategy != "resize" else 0 < kept <= budget
    assert len(image.blocks) == kept
    assert not is_recoverable(PruneSettings(strategy))


def test_an_image_whose_blocks_are_all_kept_is_not_scaled():
    pixels = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    image = prune_pixels(pixels, PruneSettings("resize"), (96, 128))
    assert image.selection.keep.shape == (3, 4)
    assert np.array_equal(image.blocks[5], pixels[32:64, 32:64])


def test_a_wrong_metric_is_refused_for_resize_too():
    with pytest.raises(ValueError, match=r"prune.metric: expected one of max, mae, got 'psnr'"):
        prune_pixels(screen(2, 2), PruneSettings("resize", metric="psnr"), (64, 64))


@pytest.mark.parametrize("strategy", BASELINES)
def test_a_baseline_generates_and_reports_its_retain_ratio(strategy, toy_model, toy_folder):
    inputs = prepare(str(toy_folder), MESSAGES, prune=strategy, resize=SMALL)
    reference = prepare(str(toy_folder), MESSAGES, prune="pred2d", resize=SMALL)
    assert inputs.num_blocks == reference.num_blocks == 54
    assert inputs.num_kept_blocks <= reference.num_kept_blocks
    assert inputs.num_tokens - inputs.num_kept_blocks == reference.num_tokens - reference.num_kept_blocks
    assert len(generate(toy_model, inputs, max_new_tokens=3).token_ids[0]) <= 3


def test_a_resized_image_is_what_the_stock_model_is_given_for_the_small_picture(toy_model, toy_tokenizer, geometry):
    """Scaling within the budget equals giving the model the scaled picture on all its tokens."""
    pixels = screen(8, 8, seed=2)
    resized = prune_pixels(pixels, PruneSettings("resize"), (256, 256))
    rows, cols = resized.selection.keep.shape
    small = np.asarray(Image.fromarray(pixels).resize((32 * cols, 32 * rows), Image.Resampling.BICUBIC))
    samples = [
        make_sample(toy_tokenizer, [image], "Where?", "(5, 8)", strategy)
        for image, strategy in ((pixels, "resize"), (small, "none"))
    ]
    logits = []
    for sample in samples:
        with torch.no_grad():
            logits.append(toy_model(**model_inputs(pack_samples([sample], geometry), geometry, torch.float32)).logits)
    assert torch.equal(*logits)
