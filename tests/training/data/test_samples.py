"""The sample screenshots through the whole preparation, next to the stock image processor and chat template."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2VLImageProcessorPil

from pixelprune.pack import VisionGeometry, normalise_blocks
from pixelprune.records.chat import ChatEncoder
from pixelprune.records.collator import PixelPruneCollator
from pixelprune.records.prepare import Preparer
from pixelprune.settings import PruneSettings, ResizeSettings
from training.composition.toy import toy_config

SAMPLES = Path(__file__).parents[3] / "data_tools" / "samples"
FILES = [SAMPLES / "train.jsonl", SAMPLES / "eval.jsonl"]


def rows_by_image() -> dict[str, dict]:
    rows: dict[str, dict] = {}
    for line in "".join(file.read_text() for file in FILES).splitlines():
        row = json.loads(line)
        rows.setdefault(row["messages"][0]["content"][0]["image"], row)
    return rows


@pytest.fixture(scope="module")
def collator(tokenizer) -> PixelPruneCollator:
    config = toy_config(tokenizer)
    preparer = Preparer(ChatEncoder(tokenizer), PruneSettings(), ResizeSettings(), config.image_token_id)
    return PixelPruneCollator(preparer, VisionGeometry.from_config(config), root=SAMPLES)


@pytest.fixture(scope="module")
def processor() -> Qwen2VLImageProcessorPil:
    return Qwen2VLImageProcessorPil(
        patch_size=16, merge_size=2, temporal_patch_size=2, image_mean=[0.5] * 3, image_std=[0.5] * 3,
        size={"shortest_edge": 256 * 256, "longest_edge": 4096 * 4096},
    )  # fmt: skip


ROWS = rows_by_image()


def test_there_are_samples():
    assert len(ROWS) >= 50


@pytest.mark.parametrize("name", sorted(ROWS))
def test_kept_patches_and_text_are_those_of_the_stock_processor(name, collator, processor, tokenizer):
    """Bit for bit in float32; and without the omitted placeholders the row is the stock row."""
    row = ROWS[name]
    pack = collator.pack([collator.preparer.prepare(row, SAMPLES).sample])
    stock = processor(images=[Image.open(SAMPLES / name)], return_tensors="pt")
    rows, cols = (stock["image_grid_thw"][0, 1:] // 2).tolist()
    image = collator.preparer.prepare(row, SAMPLES).sample.images[0]
    assert image.selection.keep.shape == (rows, cols)
    assert 0 < image.selection.num_kept < rows * cols
    kept = torch.from_numpy(np.repeat(image.selection.keep.reshape(-1), 4))
    ours = normalise_blocks(pack.blocks, collator.geometry)
    assert torch.equal(ours, stock["pixel_values"][kept])
    assert pack.blocks.numel() * 8 == stock["pixel_values"][kept].nbytes, "one uint8 frame for two of float32"

    text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
    text = text.replace("<|image_pad|>", "<|image_pad|>" * image.selection.num_kept)
    assert pack.input_ids.tolist() == tokenizer(text)["input_ids"]
