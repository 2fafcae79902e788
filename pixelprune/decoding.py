"""Around the stock `generate`: which arguments go in, and how its rows of tokens become answers."""

from __future__ import annotations

import copy
from typing import Any

from pixelprune.extras import TRAINING, require_transformers
from pixelprune.prompter import Prompter

__all__ = ["ASSISTED", "DEFAULT_NEW_TOKENS", "RESERVED", "decode", "end_token_ids", "generation_settings", "trim"]

RESERVED = ("inputs", "input_ids", "attention_mask", "position_ids", "past_key_values", "mm_encoder_outputs")
"""Arguments of the stock `generate` that are made here."""
ASSISTED = ("assistant_model", "prompt_lookup_num_tokens")
"""Assisted decoding proposes image placeholders out of the prompt, which the stock model refuses or miscounts."""
DEFAULT_NEW_TOKENS = 256
"""Where neither the call nor a generation config says how many."""


def generation_settings(
    model: Any, prompter: Prompter, max_new_tokens: int | None, generate_kwargs: dict[str, Any], **ours: Any
) -> dict[str, Any]:
    """The caller's arguments of the stock `generate`, completed: padding, length, and an output with all parts.

    ours: settings that stand above the caller's.
    Raises ValueError for arguments that would contradict the prepared prompts.
    """
    reserved = [name for name in generate_kwargs if name in RESERVED or name.startswith(("pixel_values", "image_"))]
    if reserved:
        raise ValueError(f"{', '.join(reserved)}: made from the prepared inputs, leave it out")
    assisted = [name for name in ASSISTED if generate_kwargs.get(name) is not None]
    if assisted:
        raise ValueError(f"{', '.join(assisted)}: assisted decoding is not supported with images, leave it out")
    if generate_kwargs.get("prefill_chunk_size") is not None:
        require_transformers(TRAINING, "prefill_chunk_size")
    config = generate_kwargs.get("generation_config")
    ours = {**ours, "return_dict_in_generate": True}
    if max_new_tokens is not None:
        ours["max_new_tokens"] = max_new_tokens
    elif "max_length" not in generate_kwargs and not any(_states_length(c) for c in (config, model.generation_config)):
        ours["max_new_tokens"] = DEFAULT_NEW_TOKENS
    if generate_kwargs.get("pad_token_id", getattr(config, "pad_token_id", None)) is None:
        ours["pad_token_id"] = prompter.pad_token_id
    theirs = {name: value for name, value in generate_kwargs.items() if name not in ours}
    if config is None:
        return theirs | ours
    config = copy.deepcopy(config)  # the stock method wants either a config or single arguments
    config.update(**ours)
    return theirs | {"generation_config": config}


def _states_length(config: Any) -> bool:
    return any(getattr(config, name, None) is not None for name in ("max_new_tokens", "max_length"))


def end_token_ids(model: Any, generate_kwargs: dict[str, Any]) -> set[int]:
    """The end tokens in force: argument, then generation config."""
    config = generate_kwargs.get("generation_config") or model.generation_config
    ends = generate_kwargs.get("eos_token_id", config.eos_token_id)
    if ends is None:
        ends = model.generation_config.eos_token_id
    return set() if ends is None else {ends} if isinstance(ends, int) else {int(end) for end in ends}


def trim(row: list[int], ends: set[int], pad: int) -> list[int]:
    """A generated row up to and including its first end token, without the padding of rows that ended early."""
    end = next((i for i, token in enumerate(row) if token in ends), None)
    row = row if end is None else row[: end + 1]
    while row and row[-1] == pad and pad not in ends:
        row = row[:-1]
    return row


def decode(prompter: Prompter, token_ids: list[list[int]]) -> list[str]:
    texts: list[str] = prompter.tokenizer.batch_decode(
        token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return texts
