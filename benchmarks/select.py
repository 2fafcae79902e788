"""Time of `select` relative to `image.copy()` of the same image, side by side, one thread.

python -m benchmarks.select [--repeats 15] [--images FOLDER]

Before every timed call the image is written anew, as decoding and resizing leave it; each setting is compared with a
copy timed just before, so that both meet the same machine and caches. Images up to about 10 megapixels then come from
the last-level cache, the 4096 x 4096 composite (50 MB) from memory. Times and ratios are medians over repeats, then
over images.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console

from benchmarks.parts.record import markdown_table, write_record
from pixelprune.images.image import decode_image, resize_image
from pixelprune.images.sizing import fit_size
from pixelprune.selection import select
from pixelprune.selection.stats import find_images
from pixelprune.settings import ResizeSettings

SAMPLES = Path(__file__).parents[1] / "data_tools" / "samples" / "images"
COMPOSITES = {"2716x1616": (1616, 2716), "4096x4096": (4096, 4096)}
SETTINGS = [
    *((strategy, "max", 0.0) for strategy in ("pred2d", "raster", "serpentine")),
    *(
        (strategy, metric, threshold)
        for strategy in ("pred2d", "raster", "serpentine")
        for metric in ("max", "mae")
        for threshold in (0.02, 0.1)
    ),
]


def composite(images: list[np.ndarray], height: int, width: int) -> np.ndarray:
    """Screenshots side by side and below each other until the canvas is full, then resized as the model would."""
    canvas = np.empty((height, width, 3), dtype=np.uint8)
    number, top = 0, 0
    while top < height:
        left, row_height = 0, height
        while left < width:
            part = images[number % len(images)][: height - top, : width - left]
            canvas[top : top + part.shape[0], left : left + part.shape[1]] = part
            left, row_height, number = left + part.shape[1], min(row_height, part.shape[0]), number + 1
        top += row_height
    size = fit_size(height, width)
    return np.asarray(Image.fromarray(canvas).resize((size[1], size[0]), Image.Resampling.BICUBIC))


def label(setting: tuple[str, str, float]) -> str:
    strategy, metric, threshold = setting
    return strategy if threshold == 0 else f"{strategy} {metric} {threshold:g}"


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def time_image(image: np.ndarray, repeats: int) -> dict[str, tuple[float, float]]:
    """For a copy and for every setting: median milliseconds, and median ratio to the copy made just before."""
    fresh = np.empty_like(image)
    work: dict[str, Callable[[], object]] = {"copy": fresh.copy}
    for setting in SETTINGS:
        strategy, metric, threshold = setting
        work[label(setting)] = partial(select, fresh, strategy=strategy, metric=metric, threshold=threshold)
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in work}
    for repeat in range(repeats + 2):
        for name, function in work.items():
            np.copyto(fresh, image)
            copy_seconds = seconds(fresh.copy)
            np.copyto(fresh, image)
            elapsed = seconds(function)
            if repeat >= 2:  # the first two compile and warm up
                samples[name].append((1000 * elapsed, elapsed / copy_seconds))
    return {
        name: (statistics.median(time for time, _ in pairs), statistics.median(ratio for _, ratio in pairs))
        for name, pairs in samples.items()
    }


def medians(timings: list[dict[str, tuple[float, float]]], column: int) -> dict[str, float]:
    """Median over images of milliseconds (column 0) or of ratios (column 1), per setting."""
    return {name: statistics.median(timing[name][column] for timing in timings) for name in timings[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--images", type=Path, default=SAMPLES)
    options = parser.parse_args()
    resize = ResizeSettings()
    paths, _ = find_images([options.images])
    samples = [resize_image(decode_image(path, resize), resize) for path in paths]
    groups = {"samples": samples}
    for name, (height, width) in COMPOSITES.items():
        # Starting at different screenshots gives different composites.
        groups[name] = [composite(samples[start:] + samples[:start], height, width) for start in (0, len(samples) // 2)]

    measured = {name: [time_image(image, options.repeats) for image in images] for name, images in groups.items()}
    times = {group: medians(timings, 0) for group, timings in measured.items()}
    ratios = {group: medians(timings, 1) for group, timings in measured.items()}
    rows = [{"": "image.copy()"} | {group: f"{times[group]['copy']:.3f} ms" for group in groups}]
    rows += [{"": name} | {group: f"{ratios[group][name]:.2f}x" for group in groups} for name in map(label, SETTINGS)]
    table = markdown_table(rows)
    payload = {
        "command": f"python -m benchmarks.select --repeats {options.repeats}",
        "num_images": {group: len(images) for group, images in groups.items()},
        "median_megapixels": {
            group: statistics.median(image.shape[0] * image.shape[1] / 1e6 for image in images)
            for group, images in groups.items()
        },
        "median_ms": times,
        "median_ratio_to_copy": ratios,
    }
    path = write_record("select", payload, table)
    Console().print(table, markup=False, soft_wrap=True)
    Console().print(f"wrote {path}", soft_wrap=True)


if __name__ == "__main__":
    main()
