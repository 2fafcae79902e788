"""A vision-language model from two checkpoints, as in section 4.4 of the paper:

python -m training.compose --vision Qwen/Qwen3-VL-2B-Instruct --language Qwen/Qwen3-1.7B --out FOLDER

Vision tower and mergers come from one checkpoint, the language model from the other: Qwen3-VL with a text-only Qwen3 or
another Qwen3-VL, Qwen3.5 with another Qwen3.5. Tensors are copied from file to file; neither model is ever held in
memory. `--random FOLDER` instead writes random weights for a model folder's configuration.
"""

from __future__ import annotations

import argparse
import glob
import logging
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForImageTextToText

from training.composition.plan import EMBEDDING, HEAD, Composition, plan_composition, read_config, read_vocabulary
from training.errors import UserError, need
from training.exit_codes import USER_ERROR
from training.model.loading import DTYPES, without_prediction_layers
from training.model.tensor_files import TensorFiles, write_shards

logger = logging.getLogger(__name__)

SIDE_FILES = (
    "tokenizer*", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json", "chat_template.*",
    "*processor_config.json", "generation_config.json",
)  # fmt: skip
SHARD_BYTES = 2 << 30


def write_composition(
    composition: Composition, vision: Path, language: Path, out: Path, *, dtype: str = "", seed: int = 0
) -> Path:
    """Copy the tensors and write config, tokenizer, preprocessor and model card; the folder appears when it is whole.

    dtype: bfloat16 or float32. When empty, the language model's tensors keep theirs (a delta net's `A_log` may be
    float32 among bfloat16), and the vision checkpoint's take that of the embedding. Raises UserError when `out` exists.
    """
    generator = torch.Generator().manual_seed(seed)
    with _new_folder(out) as partial, TensorFiles(vision) as from_vision, TensorFiles(language) as from_language:
        files = {"vision": from_vision, "language": from_language}
        kind = DTYPES[dtype] if dtype else from_language.rows(composition.sources[EMBEDDING][1], [0]).dtype
        kept = Counter[str]()

        def tensors() -> Iterator[tuple[str, torch.Tensor]]:
            for name, (origin, theirs) in composition.sources.items():
                tensor = files[origin].read(theirs)
                if dtype or origin == "vision":
                    tensor = tensor.to(kind)
                elif tensor.dtype != kind:
                    kept[str(tensor.dtype).removeprefix("torch.")] += 1
                if name in (EMBEDDING, HEAD) and composition.vision_rows:
                    tensor = _with_vision_rows(tensor, name, composition, from_vision)
                yield name, tensor
            std = composition.config.text_config.initializer_range
            for name, shape in composition.new.items():
                weight = torch.zeros(shape) if name.endswith("bias") else torch.randn(shape, generator=generator) * std
                yield name, weight.to(kind)

        write_shards(partial, tensors(), SHARD_BYTES)
        for config in (composition.config, composition.config.text_config, composition.config.vision_config):
            config.dtype = str(kind).removeprefix("torch.")
        others = "".join(f"; {number} tensors {name}, as the language model has them" for name, number in kept.items())
        composition.facts["precision"] = composition.config.dtype + others
        composition.config.save_pretrained(partial)
        _copy_side_files(vision, partial)
        (partial / "README.md").write_text(_card("Composed model", composition.facts))
    return out


def _with_vision_rows(
    tensor: torch.Tensor, name: str, composition: Composition, from_vision: TensorFiles
) -> torch.Tensor:
    rows = composition.vision_rows
    # A vision checkpoint with a tied head stores it as its embedding.
    source = name if name in from_vision.names else EMBEDDING
    longer = tensor.new_zeros(composition.config.text_config.vocab_size, tensor.shape[1])
    longer[: len(tensor)] = tensor
    longer[rows] = from_vision.rows(source, rows).to(tensor.dtype)
    return longer


def write_random(folder: Path, out: Path, *, dtype: str = "", seed: int = 0) -> Path:
    """Random weights for the configuration in `folder`, with its tokenizer and preprocessor.

    Raises UserError when `folder` has no image-text configuration or `out` exists.
    """
    config = read_config(folder, "--random")
    need(
        hasattr(config, "vision_config"),
        f"--random: {folder} holds a {config.model_type} config, expected one of an image-text model",
    )
    read_vocabulary(folder, "--random")
    with _new_folder(out) as partial:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForImageTextToText.from_config(config, dtype=DTYPES[dtype or "float32"])
        without_prediction_layers(model.config)
        model.save_pretrained(partial)
        _copy_side_files(folder, partial)
        facts = {"configuration": f"`{folder}`", "weights": f"random, seed {seed}", "precision": dtype or "float32"}
        (partial / "README.md").write_text(_card("Randomly initialised model", facts))
    return out


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out` that becomes it when the block ends well, and goes when it does not."""
    need(not out.exists(), f"--out: {out} exists; name a new folder")
    for left in out.parent.glob(f".{glob.escape(out.name)}.*.partial"):
        logger.warning("%s is left of a composition that was killed, unless one still runs: remove it", left)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial)
        raise


def _copy_side_files(source: Path, out: Path) -> None:
    for pattern in SIDE_FILES:
        for path in source.glob(pattern):
            shutil.copy(path, out)


def _card(title: str, facts: dict[str, str]) -> str:
    head = ["---", "library_name: transformers", "pipeline_tag: image-text-to-text", "---", "", f"# {title}", ""]
    rows = ["| part | from |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items())]
    return "\n".join(head + rows) + "\n"


def _local(path: str, flag: str) -> Path:
    """A model folder; a hub id is downloaded (weights and configuration) into the hub's cache."""
    if Path(path).is_dir():
        return Path(path)
    need(path.count("/") == 1 and not path.startswith((".", "/")), f"{flag}: no such model folder: {path}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, allow_patterns=["*.json", "*.txt", "*.jinja", "*.safetensors"]))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{flag}: {path} is no folder and cannot be downloaded: {str(error).splitlines()[0]}"
        ) from error


def main(argv: list[str] | None = None) -> int:
    """The command line. User errors end with one line and exit code 2."""
    parser = argparse.ArgumentParser(
        prog="training.compose", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--vision", help="Qwen3-VL or Qwen3.5 folder or hub id: vision tower, mergers, tokenizer, preprocessor"
    )
    parser.add_argument(
        "--language",
        help="folder or hub id: embedding, layers, output head. For Qwen3-VL a text-only Qwen3 or a Qwen3-VL, "
        "for Qwen3.5 a Qwen3.5, text-only or not",
    )
    parser.add_argument("--random", help="instead: random weights for the configuration in this folder")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--reinit-merger-output", action="store_true", help="allow widths to differ (see above)")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="", help="the language model's by default")
    parser.add_argument("--seed", type=int, default=0, help="of what is initialised at random")
    args = parser.parse_args(argv)
    console = Console(highlight=False)
    try:
        if args.random:
            write_random(_local(args.random, "--random"), args.out, dtype=args.dtype, seed=args.seed)
        else:
            need(bool(args.vision and args.language), "give --vision and --language, or --random")
            vision, language = _local(args.vision, "--vision"), _local(args.language, "--language")
            composition = plan_composition(
                vision,
                language,
                reinit_merger_output=args.reinit_merger_output,
                vision_name=args.vision,
                language_name=args.language,
            )
            write_composition(composition, vision, language, args.out, dtype=args.dtype, seed=args.seed)
            table = Table("part", "from")
            for name, value in composition.facts.items():
                table.add_row(name, value.replace("`", ""))
            console.print(table)
    except UserError as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        return USER_ERROR
    except OSError as error:  # a full disk, a folder that may not be written
        Console(stderr=True).print(f"error: --out: {error}", style="red", markup=False, soft_wrap=True)
        return USER_ERROR
    console.print(f"written to {args.out}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
