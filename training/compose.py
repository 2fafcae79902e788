"""A vision-language model from two checkpoints, as in section 4.4 of the paper:

python -m training.compose --vision Qwen/Qwen3-VL-2B-Instruct --language Qwen/Qwen3-1.7B --out FOLDER

Vision tower, merger and DeepStack mergers come from the Qwen3-VL checkpoint, the language model from the text-only
Qwen3 one. Tensors are copied from file to file; neither model is ever held in memory. `--random FOLDER` instead writes
random weights for a model folder's configuration.
"""

from __future__ import annotations

import argparse
import copy
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

from training.errors import UserError
from training.exit_codes import USER_ERROR
from training.model import DTYPES
from training.tensor_files import TensorFiles, write_shards

VISION, LANGUAGE = "model.visual.", "model.language_model."
EMBEDDING, HEAD = f"{LANGUAGE}embed_tokens.weight", "lm_head.weight"
VISION_TOKENS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
SIDE_FILES = (
    "tokenizer*", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json", "chat_template.*",
    "*processor_config.json", "generation_config.json",
)  # fmt: skip
TEXT_FIELDS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "hidden_act", "rms_norm_eps", "attention_bias", "attention_dropout", "initializer_range", "vocab_size",
    "max_position_embeddings",
)  # fmt: skip
"""What the composed text config takes from the language model; the rest is the vision checkpoint's."""
SHARD_BYTES = 2 << 30


@dataclass
class Composition:
    """A plan, made and checked before anything is copied.

    sources: name in the composed model -> (origin, name there), origin "vision" or "language".
    vision_rows: rows of the embedding (and of an untied head) taken from the vision checkpoint.
    new: tensors that are initialised, with their shapes. facts: what came from where, for the terminal and the card.
    """

    config: Any
    sources: dict[str, tuple[str, str]]
    vision_rows: list[int]
    new: dict[str, tuple[int, ...]] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)


def plan_composition(vision: Path, language: Path, *, reinit_merger_output: bool = False) -> Composition:
    """Decide where every tensor comes from and check names, shapes, tokenizers and rope against each other.

    Raises UserError for checkpoints that do not fit together, saying what was expected and what came.
    """
    ours, theirs = AutoConfig.from_pretrained(vision), AutoConfig.from_pretrained(language)
    _need(ours.model_type == "qwen3_vl", f"--vision: expected a qwen3_vl checkpoint, got {ours.model_type}")
    _need(theirs.model_type == "qwen3", f"--language: expected a text-only qwen3 checkpoint, got {theirs.model_type}")
    _need(
        not getattr(theirs, "use_sliding_window", False),
        "--language: sliding-window attention has no place in Qwen3-VL",
    )
    facts = {"vision tower, merger, DeepStack": f"`{vision}`", "language model": f"`{language}`"}
    merged, width = ours.vision_config.out_hidden_size, theirs.hidden_size
    fits = merged == width
    _need(
        fits or reinit_merger_output,
        f"the merger's output has width {merged} (out_hidden_size), the language model {width} (hidden_size); take "
        "checkpoints that agree (the paper: Qwen3-VL-2B-Instruct and Qwen3-1.7B, both 2048), or pass "
        "--reinit-merger-output to start the mergers' last layers at random",
    )
    num_deep = len(ours.vision_config.deepstack_visual_indexes)
    _need(
        num_deep <= theirs.num_hidden_layers,
        f"DeepStack feeds the first {num_deep} layers, the language model has {theirs.num_hidden_layers}",
    )
    config = _composed_config(ours, theirs, facts)
    with TensorFiles(vision) as from_vision, TensorFiles(language) as from_language:
        composition = Composition(config, {}, [], facts=facts)
        _plan_embedding(composition, ours, vision, language, from_vision, from_language, fits)
        _plan_tensors(composition, from_vision, from_language, fits)
    return composition


def _composed_config(ours: Any, theirs: Any, facts: dict[str, str]) -> Any:
    config = copy.deepcopy(ours)
    for name in TEXT_FIELDS:
        setattr(config.text_config, name, getattr(theirs, name))
    tied = bool(theirs.tie_word_embeddings)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = tied
    config.vision_config.out_hidden_size = theirs.hidden_size
    rope, language_rope = dict(ours.text_config.rope_parameters), theirs.rope_parameters
    kind = language_rope.get("rope_type", "default")
    _need(kind == "default", f"--language: rope_type {kind!r} cannot be carried over, expected 'default'")
    sections, half = rope["mrope_section"], theirs.head_dim // 2
    _need(sum(sections) == half, f"mrope_section {sections} sums to {sum(sections)}, expected head_dim / 2 = {half}")
    old_theta = rope["rope_theta"]
    # The attention's weights were trained with this theta: on text, where the three MRoPE axes agree, the composed
    # model is then exactly the language model.
    rope["rope_theta"] = language_rope["rope_theta"]
    config.text_config.rope_parameters = rope
    facts["output head"] = "tied to the embedding" if tied else "of its own, from the language model"
    facts["rope theta"] = f"{rope['rope_theta']:g}, of the language model (vision checkpoint: {old_theta:g})"
    facts["mrope_section"] = f"{sections}, of the vision checkpoint"
    return config


def _plan_embedding(
    composition: Composition,
    ours: Any,
    vision: Path,
    language: Path,
    from_vision: TensorFiles,
    from_language: TensorFiles,
    fits: bool,
) -> None:
    """Which rows of the embedding come from the vision checkpoint. The tokenizer is the vision checkpoint's."""
    ours_vocab = AutoTokenizer.from_pretrained(vision).get_vocab()
    theirs_vocab = AutoTokenizer.from_pretrained(language).get_vocab()
    moved = [token for token, number in theirs_vocab.items() if ours_vocab.get(token, number) != number]
    _need(
        not moved,
        f"the tokenizers disagree: {len(moved)} tokens have another id, such as {moved[:1]}; the language model's "
        "embedding would be read at the wrong rows",
    )
    lost = sorted(set(theirs_vocab) - set(ours_vocab))
    _need(not lost, f"the vision checkpoint's tokenizer lacks {len(lost)} of the language model's tokens: {lost[:3]}")
    ids = {getattr(ours, name) for name in VISION_TOKENS}
    new_tokens = {number for token, number in ours_vocab.items() if token not in theirs_vocab}
    num_rows = from_language.shape("model.embed_tokens.weight")[0]
    num_total = max(num_rows, 1 + max(ours_vocab.values()))
    rows = sorted(ids | new_tokens | set(range(num_rows, num_total)))
    facts, name_of = composition.facts, {number: token for token, number in ours_vocab.items()}
    facts["tokenizer"] = (
        f"of the vision checkpoint, {len(ours_vocab)} tokens; ids agree on the {len(theirs_vocab)} shared"
    )
    if fits:
        missing = [row for row in rows if row >= from_vision.shape(EMBEDDING)[0]]
        _need(not missing, f"the vision checkpoint's embedding has no row for token ids {missing[:3]}")
        composition.vision_rows = rows
        shown = ", ".join(f"`{name_of.get(row, row)}`" for row in rows[:8])
        facts["embeddings from the vision checkpoint"] = f"{len(rows)}: {shown}{' ...' if len(rows) > 8 else ''}"
    else:
        _need(
            num_total == num_rows,
            f"the language model's embedding has {num_rows} rows, the tokenizer needs {num_total}, and rows of another "
            "width cannot be copied",
        )
        facts["embeddings from the vision checkpoint"] = "none: other width; vision tokens keep the language model's"
    composition.config.text_config.vocab_size = num_total


def _plan_tensors(composition: Composition, from_vision: TensorFiles, from_language: TensorFiles, fits: bool) -> None:
    """Name every tensor's source and compare with the stock model on the meta device."""
    config, sources = composition.config, composition.sources
    with init_empty_weights():
        model = AutoModelForImageTextToText.from_config(config)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        wanted.pop(HEAD, None)
    sources |= {name: ("vision", name) for name in from_vision.names if name.startswith(VISION)}
    for name in from_language.names:
        target = name.replace("model.", LANGUAGE, 1) if name.startswith("model.") else name
        if not (target == HEAD and config.tie_word_embeddings):
            sources[target] = ("language", name)
    if not fits:
        outputs = [name for name in wanted if name.startswith(VISION) and ".linear_fc2." in name and "merger" in name]
        for name in outputs:
            sources.pop(name, None)
            composition.new[name] = wanted[name]
        composition.facts["initialised at random"] = ", ".join(f"`{name}`" for name in outputs)
    names = sources.keys() | composition.new.keys()
    _need(
        names == wanted.keys(),
        f"the parts do not make a whole: missing {sorted(wanted.keys() - names)[:3]}, unknown "
        f"{sorted(names - wanted.keys())[:3]}",
    )
    files = {"vision": from_vision, "language": from_language}
    for name, (origin, theirs) in sources.items():
        shape, expected = files[origin].shape(theirs), wanted[name]
        # Embedding and head may be longer in the composed model: by the rows that the vision checkpoint brings.
        grows = name in (EMBEDDING, HEAD) and shape[1:] == expected[1:] and shape[0] <= expected[0]
        _need(shape == expected or grows, f"{name}: expected shape {expected}, the {origin} checkpoint has {shape}")


def write_composition(
    composition: Composition, vision: Path, language: Path, out: Path, *, dtype: str = "", seed: int = 0
) -> Path:
    """Copy the tensors and write config, tokenizer, preprocessor and model card; the folder appears when it is whole.

    dtype: bfloat16 or float32; the embedding's own when empty. Raises UserError when `out` exists.
    """
    partial = _new_folder(out)
    generator = torch.Generator().manual_seed(seed)
    with TensorFiles(vision) as from_vision, TensorFiles(language) as from_language:
        files = {"vision": from_vision, "language": from_language}
        kind = DTYPES[dtype] if dtype else from_language.rows("model.embed_tokens.weight", [0]).dtype

        def tensors() -> Iterator[tuple[str, torch.Tensor]]:
            for name, (origin, theirs) in composition.sources.items():
                tensor = files[origin].read(theirs).to(kind)
                if name in (EMBEDDING, HEAD) and composition.vision_rows:
                    tensor = _with_vision_rows(tensor, name, composition, from_vision)
                yield name, tensor
            std = composition.config.text_config.initializer_range
            for name, shape in composition.new.items():
                weight = torch.zeros(shape) if name.endswith("bias") else torch.randn(shape, generator=generator) * std
                yield name, weight.to(kind)

        write_shards(partial, tensors(), SHARD_BYTES)
    composition.config.dtype = str(kind).removeprefix("torch.")
    composition.facts["precision"] = composition.config.dtype
    composition.config.save_pretrained(partial)
    _copy_side_files(vision, partial)
    (partial / "README.md").write_text(_card("Composed model", composition.facts))
    return partial.rename(out)


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
    try:
        config = AutoConfig.from_pretrained(folder)
        AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"--random: {folder}: {str(error).splitlines()[0]}") from error
    partial = _new_folder(out)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config, dtype=DTYPES[dtype or "float32"])
    model.save_pretrained(partial)
    _copy_side_files(folder, partial)
    facts = {"configuration": f"`{folder}`", "weights": f"random, seed {seed}", "precision": dtype or "float32"}
    (partial / "README.md").write_text(_card("Randomly initialised model", facts))
    return partial.rename(out)


def _new_folder(out: Path) -> Path:
    _need(not out.exists(), f"--out: {out} exists; name a new folder")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def _copy_side_files(source: Path, out: Path) -> None:
    for pattern in SIDE_FILES:
        for path in source.glob(pattern):
            shutil.copy(path, out)


def _card(title: str, facts: dict[str, str]) -> str:
    head = ["---", "library_name: transformers", "pipeline_tag: image-text-to-text", "---", "", f"# {title}", ""]
    rows = ["| part | from |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items())]
    return "\n".join(head + rows) + "\n"


def _need(holds: bool, message: str) -> None:
    if not holds:
        raise UserError(message)


def _local(path: str, flag: str) -> Path:
    """A model folder; a hub id is downloaded (weights and configuration) into the hub's cache."""
    if Path(path).is_dir():
        return Path(path)
    _need(path.count("/") == 1 and not path.startswith((".", "/")), f"{flag}: no such model folder: {path}")
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
    parser.add_argument("--vision", help="Qwen3-VL folder or hub id: vision tower, mergers, tokenizer, preprocessor")
    parser.add_argument("--language", help="text-only Qwen3 folder or hub id: embedding, layers, output head")
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
            _need(bool(args.vision and args.language), "give --vision and --language, or --random")
            vision, language = _local(args.vision, "--vision"), _local(args.language, "--language")
            composition = plan_composition(vision, language, reinit_merger_output=args.reinit_merger_output)
            composition.facts["vision tower, merger, DeepStack"] = f"`{args.vision}`"
            composition.facts["language model"] = f"`{args.language}`"
            write_composition(composition, vision, language, args.out, dtype=args.dtype, seed=args.seed)
            table = Table("part", "from")
            for name, value in composition.facts.items():
                table.add_row(name, value.replace("`", ""))
            console.print(table)
    except UserError as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        return USER_ERROR
    console.print(f"written to {args.out}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
