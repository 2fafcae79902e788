"""A toy model in a real folder: `python -m training.toy_model OUT` (see training/composition/toy.py)."""

from __future__ import annotations

import sys
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from pixelprune.command import CommandParser, plain_console
from pixelprune.family import FAMILIES
from training.command import run_command
from training.composition.toy import DEFAULT_TEXTS, build_tokenizer, build_toy_model, texts_of_records, toy_config

__all__ = ["build_tokenizer", "build_toy_model", "texts_of_records", "toy_config"]


def main(argv: list[str] | None = None) -> int:
    parser = CommandParser(
        example="python -m training.toy_model runs/tutorial/start --texts data_tools/samples/train.jsonl",
        prog="training.toy_model",
        description=(__doc__ or "").splitlines()[0],
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--texts", type=Path, help="JSONL of records whose text the tokenizer is trained on")
    parser.add_argument("--family", choices=list(FAMILIES), default="qwen3_vl", help="model family of the toy")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    def build() -> None:
        disable_progress_bar()  # of files that take milliseconds
        texts = texts_of_records(args.texts) if args.texts else DEFAULT_TEXTS
        folder = build_toy_model(args.folder, texts, family=args.family, seed=args.seed)
        plain_console().print(f"toy model written to {folder}")

    return run_command(build)


if __name__ == "__main__":
    sys.exit(main())
