"""A model's weights as they are loaded: all of them, and none that the model has no place for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, PreTrainedModel

from training.errors import UserError

_NAMED = 5
PICKLES = "pytorch_model*.bin"


def load_whole(
    path: str, *, dtype: torch.dtype, attention: str, trust_remote_code: bool = False, allow_pickle: bool = False
) -> PreTrainedModel:
    """The stock model of a folder or hub id, on the CPU.

    allow_pickle: read weights that are pickles where there are no others; reading one can run what is in it.
    Raises UserError where a tensor is missing, which the stock model would draw at random with a note in the log, where
    one is left over, and where there are no safetensors.
    """
    if not allow_pickle and Path(path).is_dir() and not any(Path(path).glob("*.safetensors")):
        found = sorted(file.name for file in Path(path).glob(PICKLES))
        pickles = f", found {found[0]}, a pickle, which can run code when it is read" if found else ", found none"
        raise UserError(
            f"{path}: expected weights as safetensors{pickles}; save them with save_pretrained, or trust them with "
            "model.allow_pickle=true"
        )
    model, info = AutoModelForImageTextToText.from_pretrained(
        path,
        dtype=dtype,
        attn_implementation=attention,
        trust_remote_code=trust_remote_code,
        use_safetensors=None if allow_pickle else True,
        device_map=None,
        output_loading_info=True,
    )
    _require_whole(path, info)
    return model


def _require_whole(path: str, info: dict[str, Any]) -> None:
    missing, left_over = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if missing:
        raise UserError(
            f"{path}: {len(missing)} tensors of the model are missing in its weights and would be random: "
            f"{_listed(missing)}; take a whole copy of the model"
        )
    if left_over:
        raise UserError(
            f"{path}: {len(left_over)} tensors of its weights have no place in the model of its config.json: "
            f"{_listed(left_over)}; take the config.json that belongs to them"
        )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
