"""The plan of a composed model: where every tensor comes from, made and checked before anything is copied."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

from training.errors import UserError, need
from training.model.loading import without_prediction_layers
from training.model.tensor_files import TensorFiles

VISION, LANGUAGE = "model.visual.", "model.language_model."
EMBEDDING, HEAD = f"{LANGUAGE}embed_tokens.weight", "lm_head.weight"
PREDICTION = "mtp."
"""Layers that predict several tokens at once. Published with Qwen3.5; the stock model has none and ignores them."""
LANGUAGES = {"qwen3_vl": ("qwen3", "qwen3_vl"), "qwen3_5": ("qwen3_5_text", "qwen3_5")}
"""Model types of a vision checkpoint, and of the language models that its architecture can hold."""
VISION_TOKENS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
MROPE_FIELDS = ("mrope_section", "mrope_interleaved")
TOKEN_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id")
TEXT_FIELDS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "hidden_act", "rms_norm_eps", "attention_bias", "attention_dropout", "initializer_range", "vocab_size",
    "max_position_embeddings",
)  # fmt: skip
"""What the composed text config takes from a Qwen3 config, which is of another class; the rest is the vision
checkpoint's. From a config of the same class it takes everything but the ids of special tokens."""


@dataclass
class Composition:
    """What goes into the composed model.

    sources: name in the composed model -> (origin, name there), origin "vision" or "language".
    vision_rows: rows of the embedding (and of an untied head) taken from the vision checkpoint.
    new: tensors that are initialised, with their shapes. facts: what came from where, for the terminal and the card.
    """

    config: Any
    sources: dict[str, tuple[str, str]]
    vision_rows: list[int]
    new: dict[str, tuple[int, ...]] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)


def plan_composition(
    vision: Path,
    language: Path,
    *,
    reinit_merger_output: bool = False,
    vision_name: str | None = None,
    language_name: str | None = None,
) -> Composition:
    """Decide where every tensor comes from and check names, shapes, tokenizers and rope against each other.

    vision_name, language_name: what the facts call the folders, such as hub ids; their paths by default.
    Raises UserError for checkpoints that do not fit together, saying what was expected and what came.
    """
    ours, theirs = read_config(vision, "--vision"), read_config(language, "--language")
    _check_types(ours, theirs)
    text = theirs.get_text_config()
    merged, width = ours.vision_config.out_hidden_size, text.hidden_size
    fits = merged == width
    need(
        fits or reinit_merger_output,
        f"the merger's output has width {merged} (out_hidden_size), the language model {width} (hidden_size); take "
        "checkpoints that agree (the paper: Qwen3-VL-2B-Instruct and Qwen3-1.7B, both 2048), or pass "
        "--reinit-merger-output to start the mergers' last layers at random",
    )
    num_deep = len(getattr(ours.vision_config, "deepstack_visual_indexes", None) or [])
    need(
        num_deep <= text.num_hidden_layers,
        f"DeepStack feeds the first {num_deep} layers, the language model has {text.num_hidden_layers}",
    )
    facts = {
        "vision tower, merger, DeepStack" if num_deep else "vision tower, merger": f"`{vision_name or vision}`",
        "language model": f"`{language_name or language}`",
    }
    with TensorFiles(vision) as from_vision, TensorFiles(language) as from_language:
        composition = Composition(_composed_config(ours, theirs, facts), {}, [], facts=facts)
        names = _language_names(from_language, composition)
        # A multimodal language checkpoint has learned the vision tokens together with its layers: they stay.
        ids = {getattr(ours, name) for name in VISION_TOKENS} if theirs is text else set()
        num_rows = (from_vision.shape(EMBEDDING)[0], from_language.shape(names[EMBEDDING])[0])
        _plan_embedding(composition, _vocabularies(vision, language), ids, num_rows, fits)
        _plan_tensors(composition, names, from_vision, from_language, fits)
    return composition


def read_config(folder: Path, flag: str) -> Any:
    """A model folder's config, of weights that are not quantised. Raises UserError that names `flag`."""
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"{flag}: {folder} has no usable config.json: {str(error).splitlines()[0]}") from error
    need(
        not any(getattr(one, "quantization_config", None) for one in (config, config.get_text_config())),
        f"{flag}: {folder} holds quantised weights (quantization_config); take the checkpoint in bfloat16",
    )
    return config


def read_vocabulary(folder: Path, flag: str) -> dict[str, int]:
    """Token -> id of a model folder's tokenizer. Raises UserError that names `flag`."""
    # transformers makes a tokenizer of one token out of a folder that has none, in silence.
    files = ("tokenizer.json", "vocab.json")
    need(
        any((folder / name).is_file() for name in files),
        f"{flag}: {folder} holds no tokenizer (tokenizer.json, or vocab.json with merges.txt); save it there",
    )
    try:
        return AutoTokenizer.from_pretrained(folder).get_vocab()
    except (OSError, ValueError) as error:
        raise UserError(f"{flag}: {folder}: its tokenizer cannot be read: {str(error).splitlines()[0]}") from error


def _check_types(ours: Any, theirs: Any) -> None:
    need(
        ours.model_type in LANGUAGES, f"--vision: expected a {' or '.join(LANGUAGES)} checkpoint, got {ours.model_type}"
    )
    allowed = LANGUAGES[ours.model_type]
    need(
        theirs.model_type in allowed,
        f"--language: expected a {' or '.join(allowed)} checkpoint for a {ours.model_type} vision tower, got "
        f"{theirs.model_type}",
    )
    need(
        not getattr(theirs, "use_sliding_window", False),
        "--language: sliding-window attention has no place in Qwen3-VL",
    )


def _composed_config(ours: Any, theirs: Any, facts: dict[str, str]) -> Any:
    config, text = copy.deepcopy(ours), theirs.get_text_config()
    same_class = type(text) is type(ours.text_config)
    if same_class:
        config.text_config = copy.deepcopy(text)
        for name in TOKEN_FIELDS:  # the tokenizer is the vision checkpoint's
            setattr(config.text_config, name, getattr(ours.text_config, name))
        config.text_config._name_or_path, config.text_config.architectures = "", None  # a local path, another class
        facts["layers"] = ", ".join(
            f"{number} {kind.replace('_', ' ')}" for kind, number in Counter(_layer_types(text)).items()
        )
    else:
        for name in TEXT_FIELDS:
            setattr(config.text_config, name, getattr(text, name))
    # The stock model reads this flag of the whole config, in a text-only checkpoint of its only one.
    tied = bool(theirs.tie_word_embeddings)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = tied
    config.vision_config.out_hidden_size = text.hidden_size
    without_prediction_layers(config)
    facts["output head"] = "tied to the embedding" if tied else "of its own, from the language model"
    config.text_config.rope_parameters = _composed_rope(ours.text_config.rope_parameters, text, same_class, facts)
    return config


def _layer_types(text: Any) -> list[str]:
    return getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers


def _composed_rope(ours: dict[str, Any], text: Any, same_class: bool, facts: dict[str, str]) -> dict[str, Any]:
    """The language model's rope, whose attention was trained with it: on text, where the three MRoPE axes agree, the
    composed model is then exactly the language model. What a text-only config does not state is the vision
    checkpoint's."""
    theirs = dict(text.rope_parameters)
    kind = theirs.get("rope_type", "default")
    need(same_class or kind == "default", f"--language: rope_type {kind!r} cannot be carried over, expected 'default'")
    # Nothing else of it: what scales the vision checkpoint's rope would scale the language model's.
    rope = theirs | {name: ours[name] for name in MROPE_FIELDS if name in ours and name not in theirs}
    need("mrope_section" in rope, "--vision: expected rope_parameters with mrope_section in its text_config")
    factor = rope.get("partial_rotary_factor", 1.0)
    sections, half = rope["mrope_section"], int(text.head_dim * factor) // 2
    need(
        sum(sections) == half,
        f"mrope_section {sections} sums to {sum(sections)}, expected head_dim * partial_rotary_factor / 2 = {half}",
    )
    facts["rope theta"] = f"{rope['rope_theta']:g}, of the language model (vision checkpoint: {ours['rope_theta']:g})"
    origin = "language model" if "mrope_section" in theirs else "vision checkpoint"
    facts["mrope_section"] = f"{sections}, of the {origin}"
    if factor != 1.0:
        facts["rotated part of a head"] = f"{factor:g}"
    return rope


def _language_names(files: TensorFiles, composition: Composition) -> dict[str, str]:
    """Name in the composed model -> name in the language checkpoint, without what the composed model has no place for.

    A text-only checkpoint names its layers `model.layers`, or `model.language_model.layers` where it was cut out of a
    multimodal one.
    """
    names, left_out = {}, Counter[str]()
    for name in files.names:
        if name.startswith((VISION, PREDICTION)):
            left_out["vision tower" if name.startswith(VISION) else "multi-token prediction"] += 1
        elif name.startswith("model.") and not name.startswith(LANGUAGE):
            names[name.replace("model.", LANGUAGE, 1)] = name
        else:
            names[name] = name
    need(EMBEDDING in names, "--language: expected an embedding, model.embed_tokens.weight, found none")
    if left_out:
        composition.facts["left out of the language checkpoint"] = ", ".join(
            f"{kind} ({number} tensors)" for kind, number in sorted(left_out.items())
        )
    if composition.config.tie_word_embeddings and (head := names.pop(HEAD, None)):
        # The stock model would load such a checkpoint untied, with a warning.
        need(
            torch.equal(files.read(head), files.read(names[EMBEDDING])),
            "--language: its config ties the output head to the embedding, its files hold another head; set "
            "tie_word_embeddings to false in its config.json",
        )
    return names


def _vocabularies(vision: Path, language: Path) -> tuple[dict[str, int], dict[str, int]]:
    """Token -> id of both tokenizers, of which the second must be part of the first."""
    ours, theirs = read_vocabulary(vision, "--vision"), read_vocabulary(language, "--language")
    moved = [token for token, number in theirs.items() if ours.get(token, number) != number]
    need(
        not moved,
        f"the tokenizers disagree: {len(moved)} tokens have another id, such as {moved[:1]}; the language model's "
        "embedding would be read at the wrong rows",
    )
    lost = sorted(set(theirs) - set(ours))
    need(not lost, f"the vision checkpoint's tokenizer lacks {len(lost)} of the language model's tokens: {lost[:3]}")
    return ours, theirs


def _plan_embedding(
    composition: Composition,
    vocabularies: tuple[dict[str, int], dict[str, int]],
    vision_ids: set[int],
    num_rows: tuple[int, int],
    fits: bool,
) -> None:
    """Which rows of the embedding come from the vision checkpoint: those of `vision_ids`, of tokens that only its
    tokenizer has, and those beyond the language model's. num_rows: of both embeddings, the vision side's first."""
    ours, theirs = vocabularies
    num_ours, num_theirs = num_rows
    facts, name_of = composition.facts, {number: token for token, number in ours.items()}
    facts["tokenizer"] = f"of the vision checkpoint, {len(ours)} tokens; ids agree on the {len(theirs)} shared"
    num_total = max(num_theirs, 1 + max(ours.values()))
    composition.config.text_config.vocab_size = num_total
    new_tokens = {number for token, number in ours.items() if token not in theirs}
    rows = sorted(vision_ids | new_tokens | set(range(num_theirs, num_total)))
    title = "embeddings from the vision checkpoint"
    if fits:
        missing = [row for row in rows if row >= num_ours]
        need(not missing, f"the vision checkpoint's embedding has no row for token ids {missing[:3]}")
        composition.vision_rows = rows
        shown = ", ".join(f"`{name_of.get(row, row)}`" for row in rows[:8])
        facts[title] = f"{len(rows)}: {shown}{' ...' if len(rows) > 8 else ''}" if rows else "none"
    else:
        need(
            num_total == num_theirs,
            f"the language model's embedding has {num_theirs} rows, the tokenizer needs {num_total}, and rows of "
            "another width cannot be copied",
        )
        facts[title] = "none: other width; vision tokens keep the language model's"


def _plan_tensors(
    composition: Composition,
    language_names: dict[str, str],
    from_vision: TensorFiles,
    from_language: TensorFiles,
    fits: bool,
) -> None:
    """Name every tensor's source and compare with the stock model on the meta device."""
    config, sources = composition.config, composition.sources
    with init_empty_weights():
        model = AutoModelForImageTextToText.from_config(config)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        wanted.pop(HEAD, None)
    sources |= {name: ("vision", name) for name in from_vision.names if name.startswith(VISION)}
    sources |= {name: ("language", stored) for name, stored in language_names.items()}
    if not fits:
        outputs = [name for name in wanted if name.startswith(VISION) and ".linear_fc2." in name and "merger" in name]
        for name in outputs:
            sources.pop(name, None)
            composition.new[name] = wanted[name]
        composition.facts["initialised at random"] = ", ".join(f"`{name}`" for name in outputs)
    names = sources.keys() | composition.new.keys()
    need(
        names == wanted.keys(),
        f"the parts do not make a whole: missing {sorted(wanted.keys() - names)[:3]}, unknown "
        f"{sorted(names - wanted.keys())[:3]}",
    )
    files = {"vision": from_vision, "language": from_language}
    for name, (origin, theirs) in sources.items():
        shape, expected = files[origin].shape(theirs), wanted[name]
        # Embedding and head may be longer in the composed model: by the rows that the vision checkpoint brings.
        grows = name in (EMBEDDING, HEAD) and shape[1:] == expected[1:] and shape[0] <= expected[0]
        need(shape == expected or grows, f"{name}: expected shape {expected}, the {origin} checkpoint has {shape}")
