"""`make demo`: real screenshots in, a pruned ZeRO-2 training run out, with a toy model, in minutes on two CPU cores."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console
from rich.panel import Panel

from launch.local import default_num_ranks, run_local
from pixelprune.command import plain_console
from training.command import run_command
from training.errors import need
from training.tracking.report import plot_convergence, summarise
from training.tracking.tracker import read_metrics

RECIPE = Path("configs/demo.yaml")
RUN = Path("runs/demo")
SAMPLES = Path("data_tools/samples")
NEXT_COMMAND = (
    "launch configs/finetune.yaml run.name=mine model.path=/path/to/Qwen3-VL-2B-Instruct "
    "data.sources.0.path=/path/to/train.jsonl data.eval_sources.0.path=/path/to/eval.jsonl"
)
"""What the demo ends with. Not its own recipe: a toy's learning rate and picture size would ruin a real model."""


def main() -> int:
    return run_command(_demo)


def _demo() -> int:
    need(SAMPLES.is_dir(), "run the demo from the root of the repository (`make demo`)")
    console = plain_console()
    _make_start_model(console)
    # A second demo is a new run, not the continuation of a finished one.
    (RUN / "metrics.jsonl").unlink(missing_ok=True)
    num_ranks = default_num_ranks()
    console.print(f"training with {num_ranks} ranks: {RECIPE}")
    code = run_local(RECIPE, [], num_ranks)
    if code == 0:
        _show_result(console)
    return code


def _make_start_model(console: Console) -> None:
    from transformers.utils.logging import disable_progress_bar

    from training.composition.toy import build_toy_model, texts_of_records

    disable_progress_bar()  # of files that take milliseconds
    folder = build_toy_model(RUN / "start", texts_of_records(SAMPLES / "train.jsonl"))
    console.print(f"a toy Qwen3-VL of 4 million random weights, in the form of the real ones: {folder}")


def _show_result(console: Console) -> None:
    rows = read_metrics(RUN)
    facts = summarise(rows)
    plot = plot_convergence({"PixelPrune": rows}, RUN / "convergence.png")
    overlay = _draw_example(RUN / "omitted_blocks.png")
    console.print(
        Panel(
            "\n".join(
                [
                    f"retain ratio of the data set  {_full_size_retain_ratio():.1%} of all blocks at full size, "
                    f"{facts['retain ratio']:.1%} at the demo's small size",
                    f"training loss                 {facts['first loss']:.3f} -> {facts['last loss']:.3f}"
                    f" in {facts['steps']:.0f} steps",
                    f"held-out loss                 {facts['first held-out loss']:.3f} -> "
                    f"{facts['last held-out loss']:.3f} (pages never trained on)",
                    f"speed                         {facts['samples/s']:.1f} samples/s",
                    "",
                    f"convergence plot              {plot}",
                    f"omitted blocks greyed out     {overlay}",
                    f"trained model (Hugging Face)  {RUN / 'export'}",
                ]
            ),
            title="PixelPrune demo",
            expand=False,
        )
    )
    console.print(f"Fine-tune a real model on your own data:\n  .venv/bin/python -m {NEXT_COMMAND}", soft_wrap=True)


def _full_size_retain_ratio() -> float:
    from pixelprune import select
    from pixelprune.images.image import decode_image, resize_image
    from pixelprune.settings import ResizeSettings

    resize = ResizeSettings()
    images = (resize_image(decode_image(path, resize), resize) for path in (SAMPLES / "images").glob("*.png"))
    selections = [select(image) for image in images]
    return sum(s.num_kept for s in selections) / sum(s.num_blocks for s in selections)


def _draw_example(path: Path) -> Path:
    from PIL import Image

    from pixelprune import select
    from pixelprune.images.image import decode_image, resize_image
    from pixelprune.selection.overlay import draw_overlay
    from pixelprune.settings import ResizeSettings

    resize = ResizeSettings()
    screenshot = sorted((SAMPLES / "images").glob("*.png"))[0]
    image = resize_image(decode_image(screenshot, resize), resize)
    Image.fromarray(draw_overlay(image, select(image))).save(path)
    return path


if __name__ == "__main__":
    sys.exit(main())
