"""Retain ratios of the sample screenshots: every strategy exact, and over thresholds for both metrics.

python -m benchmarks.retain [--images FOLDER]

A retain ratio is the kept blocks of all images over the blocks of all images. Nothing is timed.
"""

import argparse
from pathlib import Path

from rich.console import Console

from benchmarks.parts.record import markdown_table, write_record
from benchmarks.select import SAMPLES
from pixelprune.selection.stats import DatasetStats, ImageStats, find_images, measure_files
from pixelprune.settings import PruneSettings, ResizeSettings

STRATEGIES = ("pred2d", "raster", "serpentine")
THRESHOLDS = (0.0, 0.005, 0.02, 0.05, 0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, default=SAMPLES)
    options = parser.parse_args()
    rules = {
        f"{strategy}/{metric}/{threshold:g}": PruneSettings(strategy=strategy, metric=metric, threshold=threshold)
        for strategy in STRATEGIES
        for metric in ("max", "mae")
        for threshold in THRESHOLDS
    }
    paths, unreadable = find_images([options.images])
    outcomes = list(measure_files(paths, rules, ResizeSettings(), num_threads=2))
    images = [outcome for outcome in outcomes if isinstance(outcome, ImageStats)]
    unreadable += [outcome for outcome in outcomes if not isinstance(outcome, ImageStats)]
    if unreadable:
        raise ValueError(f"images that cannot be measured: {unreadable}")
    result = DatasetStats(images)
    rows = [
        {"strategy": strategy, "metric": metric}
        | {
            f"threshold {threshold:g}": f"{result.retain_ratio(f'{strategy}/{metric}/{threshold:g}'):.2%}"
            for threshold in THRESHOLDS
        }
        for strategy in STRATEGIES
        for metric in ("max", "mae")
    ]
    height, width = result.mean_size()
    summary = (
        f"{len(images)} sample screenshots, {result.num_blocks} blocks, mean size {width:.0f} x {height:.0f}; "
        f"{result.duplicate_ratio:.1%} of the blocks equal another block of their image."
    )
    table = f"{summary}\n\n{markdown_table(rows)}"
    payload = {
        "command": "python -m benchmarks.retain",
        "num_images": len(images),
        "num_blocks": result.num_blocks,
        "mean_size": [height, width],
        "duplicate_ratio": result.duplicate_ratio,
        "retain_ratio": {name: result.retain_ratio(name) for name in rules},
    }
    path = write_record("retain", payload, table)
    Console().print(table, markup=False, soft_wrap=True)
    Console().print(f"wrote {path}", soft_wrap=True)


if __name__ == "__main__":
    main()
