"""From a record on disk to a packed batch, on one core, next to the stock Hugging Face preparation.

    python -m benchmarks.data [--records FILE.jsonl ...] [--batch 6] [--repeats 5]

Stock: PIL decode, the PIL image processor, chat template, tokenisation, placeholders repeated. Ours: what a loader
worker runs. Both work on the same batches in turns, in one process pinned to one core; medians over the repeats.
Stages are timed one by one in the same run; "preparation" is everything after decode and resize. Times are processor
time, user and system: what a core of one's own would take, whoever else uses the machine during the measurement.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import Qwen2VLImageProcessorPil

from benchmarks.parts.record import markdown_table, write_record
from pixelprune.images.image import decode_pixels, prune_pixels, resize_image
from pixelprune.images.png import deflate
from pixelprune.pack import VisionGeometry
from pixelprune.records.chat import ChatEncoder
from pixelprune.records.collator import PixelPruneCollator
from pixelprune.records.prepare import Preparer
from pixelprune.records.reader import parse_record
from pixelprune.sample import build_sample
from pixelprune.settings import PruneSettings, ResizeSettings
from training.composition.toy import build_tokenizer, texts_of_records, toy_config

SAMPLES = Path(__file__).parents[1] / "data_tools" / "samples"
COLLATOR_PIXELS = ("patches", "blocks")
PIXELS = {"min_pixels": 256 * 256, "max_pixels": 4096 * 4096}


class Stock:
    """What a training script built on the Hugging Face processor does for a batch."""

    def __init__(self, tokenizer, image_token_id: int, root: Path):
        self.tokenizer, self.image_token_id, self.root = tokenizer, image_token_id, root
        self.processor = Qwen2VLImageProcessorPil(
            patch_size=16,
            merge_size=2,
            temporal_patch_size=2,
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
            size={"shortest_edge": PIXELS["min_pixels"], "longest_edge": PIXELS["max_pixels"]},
        )

    def decode(self, batch: list[dict]) -> list[Image.Image]:
        return [Image.open(self.root / image_name(row)).convert("RGB") for row in batch]

    def resize(self, pictures: list[Image.Image], resized: list[np.ndarray]) -> list[Image.Image]:
        """The processor's own call of Pillow, by itself."""
        sizes = [image.shape[1::-1] for image in resized]
        return [p.resize(size, Image.Resampling.BICUBIC) for p, size in zip(pictures, sizes, strict=True)]

    def finish(self, batch: list[dict], pictures: list[Image.Image]) -> dict:
        features = self.processor(images=pictures, return_tensors="pt")
        rows = []
        for row, grid in zip(batch, features["image_grid_thw"], strict=True):
            text = self.tokenizer.apply_chat_template(row["messages"], tokenize=False)
            ids = np.array(self.tokenizer(text, add_special_tokens=False)["input_ids"])
            rows.append(np.repeat(ids, np.where(ids == self.image_token_id, int(grid.prod()) // 4, 1)))
        return {"input_ids": torch.from_numpy(np.concatenate(rows)), "pixel_values": features["pixel_values"]}

    def __call__(self, batch: list[dict]) -> dict:
        return self.finish(batch, self.decode(batch))


class Ours:
    """What a loader worker does for a pack, whole and in its stages."""

    def __init__(self, collator: PixelPruneCollator, root: Path):
        self.collator, self.preparer, self.root = collator, collator.preparer, root

    def __call__(self, batch: list[dict]):
        return self.collator.pack([self.preparer.prepare(row, self.root).sample for row in batch])

    def decode(self, batch: list[dict]) -> list[np.ndarray]:
        return [decode_pixels((self.root / image_name(row)).read_bytes(), self.preparer.resize) for row in batch]

    def resize(self, pictures: list[np.ndarray]) -> list[np.ndarray]:
        return [resize_image(picture, self.preparer.resize) for picture in pictures]

    def finish(self, batch: list[dict], images: list[np.ndarray]):
        samples = []
        for row, image in zip(batch, images, strict=True):
            chat = self.preparer.chat.encode(parse_record(row))
            pruned = [prune_pixels(image, self.preparer.prune, image.shape[:2])]
            samples.append(build_sample(chat, pruned, image_token_id=self.preparer.image_token_id))
        return self.collator.pack(samples)


def image_name(row: dict) -> str:
    return row["messages"][0]["content"][0]["image"]


def one_record_per_image(files: list[Path]) -> list[dict]:
    """The first record of every image, in an order that mixes sizes into each batch."""
    rows: dict[str, dict] = {}
    for file in files:
        for line in file.read_text().splitlines():
            row = json.loads(line)
            rows.setdefault(image_name(row), row)
    names = sorted(rows)
    return [rows[names[i]] for i in np.random.default_rng(0).permutation(len(names))]


def timed(function: Callable, *arguments: Any, **options: Any) -> tuple[float, Any]:
    start = time.process_time()
    result = function(*arguments, **options)
    return time.process_time() - start, result


def measure_batch(stock: Stock, ours: Ours, batch: list[dict]) -> dict[str, float]:
    """Seconds of every stage for one batch."""
    seconds = {}
    seconds["stock"], stock_row = timed(stock, batch)
    seconds["ours"], pack = timed(ours, batch)
    for pixels in COLLATOR_PIXELS:
        collator = dataclasses.replace(ours.collator, pixels=pixels)
        seconds[f"collator {pixels}"], _ = timed(collator, batch)
    seconds["ours decode"], pictures = timed(ours.decode, batch)
    seconds["ours resize"], images = timed(ours.resize, pictures)
    seconds["ours preparation"], _ = timed(ours.finish, batch, images)
    seconds["stock decode"], stock_pictures = timed(stock.decode, batch)
    seconds["stock resize"], _ = timed(stock.resize, stock_pictures, images)
    # By difference: asking the stock processor not to resize would be slower than its default path.
    seconds["stock preparation"] = seconds["stock"] - seconds["stock decode"] - seconds["stock resize"]
    check_equal(stock_row, pack, ours.collator.geometry)
    return seconds


def check_equal(stock_row: dict, pack, geometry: VisionGeometry) -> None:
    """A comparison of speed is one of the same result: the kept patches are the stock processor's, bit for bit."""
    from pixelprune.pack import normalise_blocks

    patches = normalise_blocks(pack.blocks, geometry)
    theirs = stock_row["pixel_values"].reshape(-1, 4 * patches.shape[1])
    found = {hash(row.numpy().tobytes()) for row in theirs}
    ours = patches.reshape(-1, 4 * patches.shape[1])
    assert all(hash(row.numpy().tobytes()) in found for row in ours), "kept patches differ from the stock processor's"


def build(files: list[Path]) -> tuple[Stock, Ours]:
    texts = [text for file in files for text in texts_of_records(file)]
    tokenizer = build_tokenizer(texts)
    config = toy_config(tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        chat = ChatEncoder.from_folder(folder)
    preparer = Preparer(chat, PruneSettings(), ResizeSettings(**PIXELS), config.image_token_id)
    root = files[0].parent
    collator = PixelPruneCollator(preparer, VisionGeometry.from_config(config), root)
    return Stock(chat.tokenizer, config.image_token_id, root), Ours(collator, root)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, nargs="+", default=[SAMPLES / "train.jsonl", SAMPLES / "eval.jsonl"])
    parser.add_argument("--batch", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    stock, ours = build(arguments.records)
    rows = one_record_per_image(arguments.records)
    batches = [rows[i : i + arguments.batch] for i in range(0, len(rows), arguments.batch)]
    measure_batch(stock, ours, batches[0])  # compiles and warms caches
    runs = [[measure_batch(stock, ours, batch) for batch in batches] for _ in range(arguments.repeats)]
    stages = list(runs[0][0])
    # Median over repeats of each batch, then summed over the set: every screenshot counts once.
    total = {s: sum(statistics.median(run[i][s] for run in runs) for i in range(len(batches))) for s in stages}
    packs = [ours(batch) for batch in batches]
    kept, full = sum(pack.num_kept_blocks for pack in packs), sum(pack.num_full_blocks for pack in packs)
    pixel_bytes = sum(pack.blocks.numel() for pack in packs)
    stock_bytes = sum(stock(batch)["pixel_values"].nbytes for batch in batches)
    summary = {
        "num_screenshots": len(rows),
        "retain_ratio": kept / full,
        "samples_per_second_stock": len(rows) / total["stock"],
        "samples_per_second_ours": len(rows) / total["ours"],
        "speedup_record_to_pack": total["stock"] / total["ours"],
        "speedup_with_pillows_resize": total["stock"] / (total["ours"] - total["ours resize"] + total["stock resize"]),
        "speedup_preparation_after_resize": total["stock preparation"] / total["ours preparation"],
        "pixel_bytes_per_image_stock": stock_bytes / len(rows),
        "pixel_bytes_per_image_ours": pixel_bytes / len(rows),
        "pixel_bytes_ratio": pixel_bytes / stock_bytes,
        "pixel_bytes_target": kept / full / 8,
    }
    table = describe(total, summary)
    if deflate is None:
        table += "\n\nWithout the package deflate: Pillow decoded."
    payload = {"batch": arguments.batch, "repeats": arguments.repeats, "seconds": total, **summary}
    write_record("data_cpu", payload, table)
    print(table)


def describe(total: dict[str, float], summary: dict[str, float]) -> str:
    """Two small tables: milliseconds per screenshot by stage, and the ratios."""
    per_image = {stage: 1000 * seconds / summary["num_screenshots"] for stage, seconds in total.items()}

    def row(name: str, stock: float, ours: float) -> dict[str, str]:
        numbers = {"stock": f"{stock:.1f}", "PixelPrune": f"{ours:.2f}", "stock / PixelPrune": f"{stock / ours:.1f}"}
        return {"ms per screenshot": name, **numbers}

    with_pillow = per_image["ours"] - per_image["ours resize"] + per_image["stock resize"]
    stages = markdown_table(
        [
            row("decode", per_image["stock decode"], per_image["ours decode"]),
            row("resize (equal in every bit)", per_image["stock resize"], per_image["ours resize"]),
            row("preparation after resize", per_image["stock preparation"], per_image["ours preparation"]),
            row("record to packed batch", per_image["stock"], per_image["ours"]),
            row("the same with Pillow's resize", per_image["stock"], with_pillow),
            row("collator in another trainer, uint8 blocks", per_image["stock"], per_image["collator blocks"]),
            row("collator in another trainer, float32 patches", per_image["stock"], per_image["collator patches"]),
        ]
    )
    mib = 2**20
    return (
        f"{summary['num_screenshots']} screenshots, retain ratio {summary['retain_ratio']:.3f}; "
        f"{summary['samples_per_second_stock']:.1f} samples/s stock, "
        f"{summary['samples_per_second_ours']:.1f} PixelPrune, one core.\n\n{stages}\n\n"
        "Pixel bytes per image handed on: "
        f"{summary['pixel_bytes_per_image_stock'] / mib:.1f} MiB stock, "
        f"{summary['pixel_bytes_per_image_ours'] / mib:.2f} MiB PixelPrune, a ratio of "
        f"{summary['pixel_bytes_ratio']:.4f} (retain ratio / 8 = {summary['pixel_bytes_target']:.4f}). "
        "Kept patches were compared with the stock processor's, bit for bit, in the same run."
    )


if __name__ == "__main__":
    main()
