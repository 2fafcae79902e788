"""What pruning saves before the first token: the columns of the paper's Table 4, Full and PixelPrune side by side.

    python -m benchmarks.prefill --shapes toy --device cpu
    python -m benchmarks.prefill --shapes 2b --device cuda --images FOLDER
    python -m benchmarks.prefill --model FOLDER --device cuda

Every repeat runs both modes once on the same images, from encoded bytes to the first token: host work (decode, resize,
select, gather, tokenise), vision tower (with the copy to the device and the normalisation), and the language model's
prefill into a key-value cache. Times are medians over the repeats; the selector is timed apart, on decoded and resized
pixels. FLOPs are the cost model's for this prompt (causal attention, one position in the head). Random weights
(`--shapes`) cost what trained ones cost.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from transformers import DynamicCache

from benchmarks.parts.record import markdown_table, write_record
from benchmarks.parts.shapes import SHAPES, random_model
from pixelprune.flops import CostModel
from pixelprune.hf import PrunedInputs, encode_images, padded_rows, prepare
from pixelprune.images.image import decode_image, resize_image
from pixelprune.prompter import Prompter
from pixelprune.selection import select
from pixelprune.settings import PruneSettings, ResizeSettings
from training.composition.toy import build_tokenizer
from training.config.settings import ATTENTION_NAMES
from training.model.attention import choose_attention, load_pretrained
from training.model.loading import DTYPES

SAMPLES = Path(__file__).parents[1] / "data_tools" / "samples" / "images"
QUESTION = "Click the button that saves the settings."
MIB = 2**20


@dataclass
class Timings:
    """Seconds of every repeat, by stage, and what the last repeat held."""

    host: list[float] = field(default_factory=list)
    vision: list[float] = field(default_factory=list)
    prefill: list[float] = field(default_factory=list)
    first_token: list[float] = field(default_factory=list)
    cache_bytes: int = 0
    peak_bytes: int = 0

    def medians_ms(self) -> dict[str, float]:
        stages = {"host_ms": self.host, "vit_ms": self.vision, "llm_ms": self.prefill, "ttft_ms": self.first_token}
        return {name: 1000 * statistics.median(seconds) for name, seconds in stages.items()}


def read_images(folder: Path, num_images: int) -> list[bytes]:
    """The encoded bytes of that many images of a folder, largest first."""
    files = sorted(folder.glob("*.png"))
    if not files:
        raise SystemExit(f"{folder}: no .png files (--images)")
    files.sort(key=lambda file: -_num_pixels(file))
    return [files[number % len(files)].read_bytes() for number in range(num_images)]


def _num_pixels(file: Path) -> int:
    with Image.open(file) as picture:
        return picture.width * picture.height


def selector_ms(images: list[bytes], prompter: Prompter, repeats: int) -> float:
    """Median time of `select` over all images, on decoded and resized pixels."""
    pixels = [resize_image(decode_image(image, prompter.resize), prompter.resize) for image in images]
    settings = prompter.prune

    def run() -> None:
        for image in pixels:
            select(image, strategy=settings.strategy, metric=settings.metric, threshold=settings.threshold)

    run()  # compile
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


@torch.no_grad()
def first_token(model: Any, prompter: Prompter, images: list[bytes], timings: Timings | None) -> PrunedInputs:
    """From encoded images to the first token on the host, timed by stage."""
    device = model.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    clock = _clock(device)
    start = clock()
    content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": QUESTION}]
    inputs = prepare(prompter, [{"role": "user", "content": content}])
    prepared = clock()
    encoded = encode_images(model, inputs.samples, prompter)
    seen = clock()
    cache = DynamicCache(config=model.config)
    logits = model(
        **padded_rows(model, inputs), **encoded, past_key_values=cache, use_cache=True, logits_to_keep=1
    ).logits
    logits[0, -1].argmax().item()
    end = clock()
    if timings is not None:
        timings.host.append(prepared - start)
        timings.vision.append(seen - prepared)
        timings.prefill.append(end - seen)
        timings.first_token.append(end - start)
        timings.cache_bytes = cache_bytes(cache)
        timings.peak_bytes = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    return inputs


def _clock(device: torch.device) -> Callable[[], float]:
    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    return now


def cache_bytes(cache: DynamicCache) -> int:
    """Bytes of the tensors that every layer of the cache holds."""
    held = (value for layer in cache.layers for value in vars(layer).values() if isinstance(value, torch.Tensor))
    return sum(tensor.numel() * tensor.element_size() for tensor in held)


def flops_of(cost: CostModel, inputs: PrunedInputs) -> float:
    (sample,) = inputs.samples
    kept = [image.selection.num_kept for image in sample.images]
    return cost.sample_flops(kept_blocks=kept, text_tokens=len(sample) - sum(kept), supervised_tokens=1, training=False)


def measure(model: Any, prompters: dict[str, Prompter], images: list[bytes], repeats: int) -> list[dict[str, Any]]:
    """One row per mode, for one set of images."""
    cost = CostModel.from_config(model.config)
    timings = {mode: Timings() for mode in prompters}
    inputs = {mode: first_token(model, prompter, images, None) for mode, prompter in prompters.items()}  # warm up
    for _ in range(repeats):
        for mode, prompter in prompters.items():
            first_token(model, prompter, images, timings[mode])
    return [
        {
            "images": len(images),
            "mode": mode,
            "full_tokens": inputs[mode].num_tokens - inputs[mode].num_kept_blocks + inputs[mode].num_blocks,
            "tokens": inputs[mode].num_tokens,
            "retain_ratio": inputs[mode].retain_ratio,
            "selector_ms": selector_ms(images, prompter, repeats) if prompter.prune.strategy != "none" else 0.0,
            "flops": flops_of(cost, inputs[mode]),
            "flops_whole_square": flops_of(cost.whole_square(), inputs[mode]),
            **timings[mode].medians_ms(),
            "kv_cache_mib": timings[mode].cache_bytes / MIB,
            "peak_mib": timings[mode].peak_bytes / MIB if model.device.type == "cuda" else None,
            "ttft_samples_s": timings[mode].first_token,
        }
        for mode, prompter in prompters.items()
    ]


def table_of(rows: list[dict[str, Any]]) -> str:
    """The rows with, in brackets, how many times less than Full."""
    full = {row["images"]: row for row in rows if row["mode"] == "Full"}

    def less(row: dict, key: str, text: str) -> str:
        ratio = full[row["images"]][key] / row[key]
        return text if row["mode"] == "Full" else f"{text} ({ratio:.2f}x)"

    return markdown_table(
        [
            {
                "images": row["images"],
                "mode": row["mode"],
                "selector ms": "-" if row["mode"] == "Full" else f"{row['selector_ms']:.2f}",
                "retain": f"{row['retain_ratio']:.1%}",
                "tokens": row["tokens"],
                "TFLOPs": less(row, "flops", f"{row['flops'] / 1e12:.3f}"),
                "TFLOPs, whole square": less(row, "flops_whole_square", f"{row['flops_whole_square'] / 1e12:.3f}"),
                "host ms": f"{row['host_ms']:.0f}",
                "ViT ms": less(row, "vit_ms", f"{row['vit_ms']:.0f}"),
                "LLM prefill ms": less(row, "llm_ms", f"{row['llm_ms']:.0f}"),
                "TTFT ms": less(row, "ttft_ms", f"{row['ttft_ms']:.0f}"),
                "KV cache MiB": less(row, "kv_cache_mib", f"{row['kv_cache_mib']:.1f}"),
            }
            for row in rows
        ]
    )


def load(arguments: argparse.Namespace) -> tuple[Any, dict[str, Prompter]]:
    """The model on its device and a prompter per mode; both modes resize alike."""
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    resize = ResizeSettings(min_pixels=arguments.min_pixels, max_pixels=arguments.max_pixels)
    pruned = PruneSettings(arguments.strategy, arguments.metric, arguments.threshold)
    modes = {"Full": PruneSettings("none"), "PixelPrune": pruned}
    if arguments.model:
        model = load_pretrained(arguments.model, attention=arguments.attention, dtype=dtype).to(device).eval()
        source: Any = arguments.model
    else:
        model = random_model(arguments.shapes, device=device, dtype=dtype, attention=arguments.attention)
        source = _BareProcessor()
    return model, {mode: Prompter.load(source, prune=prune, resize=resize) for mode, prune in modes.items()}


class _BareProcessor:
    """What random weights are prompted with: the toy tokenizer, in the published chat format."""

    def __init__(self) -> None:
        self.tokenizer = build_tokenizer()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", help="model folder or hub id")
    which.add_argument("--shapes", default="toy", choices=SHAPES, help="random weights of this size")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on cuda, float32 on cpu")
    parser.add_argument("--attention", choices=ATTENTION_NAMES, default="auto", help="as model.attention of a recipe")
    parser.add_argument("--images", type=Path, default=SAMPLES, help="folder of .png screenshots; the largest are used")
    parser.add_argument("--num-images", type=int, nargs="+", default=[1, 4], help="one measurement for each number")
    parser.add_argument("--min-pixels", type=int, default=256 * 256)
    parser.add_argument("--max-pixels", type=int, default=4096 * 4096)
    parser.add_argument("--strategy", default="pred2d")
    parser.add_argument("--metric", default="max")
    parser.add_argument("--threshold", type=float, default=0.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="torch threads on the host")
    parser.add_argument("--name", help="name of the record under benchmarks/results")
    arguments = parser.parse_args()
    arguments.dtype = arguments.dtype or ("bfloat16" if arguments.device.startswith("cuda") else "float32")
    device = torch.device(arguments.device)
    arguments.attention = choose_attention(arguments.attention, device, DTYPES[arguments.dtype])
    torch.set_num_threads(arguments.threads)
    model, prompters = load(arguments)
    rows: list[dict[str, Any]] = []
    for num_images in arguments.num_images:
        rows += measure(model, prompters, read_images(arguments.images, num_images), arguments.repeats)
    size = Path(arguments.model).name if arguments.model else arguments.shapes
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}
    table = table_of(rows)
    settings["images"] = arguments.images.name  # no path of this machine in a committed record
    settings["load_average"] = os.getloadavg()  # how busy the machine was with other work
    write_record(arguments.name or f"prefill_{size}_{model.device.type}", {"settings": settings, "rows": rows}, table)
    Console().print(table, markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
