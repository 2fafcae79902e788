"""Loading the stock model of a recipe, and how its layers compute."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from pixelprune.files import path_meant
from pixelprune.model_folder import ModelFolder, is_hub_id
from training.config.settings import AUTO, ConfigError, ModelSettings
from training.distributed.ranks import Ranks
from training.model.attention import load_pretrained
from training.model.attention_check import check_attention
from training.model.compiled import compile_layers
from training.model.fused import use_fused

logger = logging.getLogger(__name__)

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def load_model_files(settings: ModelSettings, key: str = "model.path") -> ModelFolder:
    """The model folder or hub id of a recipe, without its weights. Raises ConfigError naming `key`."""
    path = settings.path
    if not (Path(path).is_dir() or is_hub_id(path)):
        meant = path_meant(Path(path))
        raise ConfigError(f"{key}: no such model folder: {path}" + (f"; did you mean {meant}?" if meant else ""))
    try:
        return ModelFolder.open(path, trust_remote_code=settings.trust_remote_code)
    except ValueError as error:
        raise ConfigError(f"{key}: {error}") from error


def load_model_files_once(settings: ModelSettings, ranks: Ranks, key: str = "model.path") -> ModelFolder:
    """As `load_model_files`, on every rank; of a hub id one rank asks first, for all that share its cache or its fate.

    Every rank calls this.
    """
    if is_hub_id(settings.path):

        def ask() -> None:
            logger.info("%s: %s is no folder here; asking the hub for it", key, settings.path)
            load_model_files(settings, key)

        ranks.from_first(ask)
    return load_model_files(settings, key)


def load_model(settings: ModelSettings, *, attention: str, device: torch.device) -> PreTrainedModel:
    """The stock model with its weights on `device`; attention as `training.model.attention.choose_attention` gave it.

    Raises ConfigError for quantised weights, UserError for weights that are not whole or not safetensors.
    """
    config = AutoConfig.from_pretrained(settings.path, trust_remote_code=settings.trust_remote_code)
    if getattr(config, "quantization_config", None):
        raise ConfigError(f"model.path, kd.path: {settings.path} holds quantised weights; take the one in bfloat16")
    model = load_pretrained(
        settings.path,
        attention=attention,
        dtype=DTYPES[settings.dtype],
        trust_remote_code=settings.trust_remote_code,
        allow_pickle=settings.allow_pickle,
    ).to(device)
    without_prediction_layers(model.config)
    return model


def without_prediction_layers(config: Any) -> None:
    """Layers for multi-token prediction (published with Qwen3.5) are not loaded by the stock model, so neither trained
    nor written: what reads the config must not look for them."""
    if getattr(config.text_config, "mtp_num_hidden_layers", 0):
        config.text_config.mtp_num_hidden_layers = 0


def enable_recomputation(model: PreTrainedModel, settings: ModelSettings) -> None:
    """Recompute every k-th layer of the ViT and of the language model in backward (non-reentrant).

    The settings say how many: AUTO has been decided by `training.loop.memory.plan_memory`.
    """
    assert AUTO not in (settings.recompute_vit, settings.recompute_llm), "AUTO is resolved by plan_memory"
    for part, every in (
        (model.model.visual, settings.recompute_vit),
        (model.model.language_model, settings.recompute_llm),
    ):
        if every:
            part.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=every)


def prepare_layers(
    model: PreTrainedModel, settings: ModelSettings, device: torch.device, *, shares_prefix: bool = False
) -> None:
    """How this model's layers compute, as the settings say: recomputed, with fused kernels, compiled. Not what.

    shares_prefix: it will be given rows whose samples share one. Raises RankError where its attention computes wrong on
    this device.
    """
    if settings.check_attention:
        check_attention(model, device, shares_prefix=shares_prefix)
    enable_recomputation(model, settings)
    if settings.liger:
        use_fused(model, device)
    if settings.compile:
        compile_layers(model, settings.compile_max_recompiles)
