"""Writing a model: a composition's tensors copied from file to file, or random weights for a configuration."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText

from pixelprune.files import whole_folder
from training.composition.plan import EMBEDDING, HEAD, Composition, read_config, read_vocabulary
from training.errors import need
from training.model.loading import DTYPES, without_prediction_layers
from training.model.tensor_files import TensorFiles, write_shards

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
    _refuse_to_replace(out)
    with whole_folder(out) as partial, TensorFiles(vision) as from_vision, TensorFiles(language) as from_language:
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
    _refuse_to_replace(out)
    with whole_folder(out) as partial:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForImageTextToText.from_config(config, dtype=DTYPES[dtype or "float32"])
        without_prediction_layers(model.config)
        model.save_pretrained(partial)
        _copy_side_files(folder, partial)
        facts = {"configuration": f"`{folder}`", "weights": f"random, seed {seed}", "precision": dtype or "float32"}
        (partial / "README.md").write_text(_card("Randomly initialised model", facts))
    return out


def _refuse_to_replace(out: Path) -> None:
    need(not out.exists(), f"--out: {out} exists; name a new folder")


def _copy_side_files(source: Path, out: Path) -> None:
    for pattern in SIDE_FILES:
        for path in source.glob(pattern):
            shutil.copy(path, out)


def _card(title: str, facts: dict[str, str]) -> str:
    head = ["---", "library_name: transformers", "pipeline_tag: image-text-to-text", "---", "", f"# {title}", ""]
    rows = ["| part | from |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items())]
    return "\n".join(head + rows) + "\n"
