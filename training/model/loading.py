"""Loading the stock model, and the module that the engine runs: packed row in, loss sums out."""

from __future__ import annotations

import dataclasses
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from pixelprune.family import family_of
from pixelprune.model_call import final_hidden
from pixelprune.pack import Pack, VisionGeometry
from pixelprune.prompter import check_image_token
from training.config.settings import AUTO, ConfigError, ModelSettings
from training.data.taught import TaughtPack
from training.loss.supervised import LossSettings, LossSums, supervised_loss
from training.model.attention import load_pretrained
from training.model.compiled import compile_layers
from training.model.fused import use_fused

logger = logging.getLogger(__name__)

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class ModelFiles:
    """What the data path needs of a model folder, without its weights."""

    path: str
    config: object
    tokenizer: object
    preprocessor: dict
    geometry: VisionGeometry


def load_model_files(settings: ModelSettings) -> ModelFiles:
    """Config, tokenizer and preprocessor of a model folder or hub id. Raises ConfigError naming model.path."""
    path = settings.path
    if (Path(path).is_absolute() or path.startswith(".") or "/" not in path) and not Path(path).is_dir():
        raise ConfigError(f"model.path: no such model folder: {path}")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=settings.trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=settings.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path: {path} is not a loadable model folder: {str(error).splitlines()[0]}") from error
    try:
        family_of(config)
        check_image_token(tokenizer, config, path)
    except ValueError as error:
        raise ConfigError(f"model.path: {error}") from error
    preprocessor = _read_preprocessor(path)
    geometry = VisionGeometry.from_config(config, preprocessor)
    return ModelFiles(path, config, tokenizer, preprocessor, geometry)


def load_model(settings: ModelSettings, *, attention: str, device: torch.device) -> PreTrainedModel:
    """The stock model with its weights on `device`; attention as `training.model.attention.choose_attention` gave it.

    Raises ConfigError for quantised weights.
    """
    config = AutoConfig.from_pretrained(settings.path, trust_remote_code=settings.trust_remote_code)
    if getattr(config, "quantization_config", None):
        raise ConfigError(f"model.path, kd.path: {settings.path} holds quantised weights; take the one in bfloat16")
    model = load_pretrained(
        settings.path,
        attention=attention,
        dtype=DTYPES[settings.dtype],
        trust_remote_code=settings.trust_remote_code,
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


def prepare_layers(model: PreTrainedModel, settings: ModelSettings, device: torch.device) -> None:
    """How this model's layers compute, as the settings say: recomputed, with fused kernels, compiled. Not what."""
    enable_recomputation(model, settings)
    if settings.liger:
        use_fused(model, device)
    if settings.compile:
        compile_layers(model, settings.compile_max_recompiles)


class Teacher(Protocol):
    """What `training.teacher.teachers` builds."""

    def targets(self, pack: TaughtPack) -> dict[str, Any]:
        """The teacher's arguments of `supervised_loss` for this pack."""
        ...


class SupervisedModel(nn.Module):
    """The stock model plus the loss, as one module: the engine sees one forward per micro-step.

    The inner stock model gives final hidden states; the output head runs only at positions that predict a supervised
    token, in chunks. This equals the stock forward with `logits_to_keep` (tested) without its (N, V) logits.

    teacher: what a TaughtPack is learned from. It is no submodule: optimizer, checkpoint and export never see it.
    """

    def __init__(
        self, model: PreTrainedModel, geometry: VisionGeometry, loss: LossSettings, teacher: Teacher | None = None
    ):
        super().__init__()
        assert not isinstance(teacher, nn.Module), "a submodule's weights would be trained and saved"
        self.model = model
        self.geometry = geometry
        self.loss = loss
        self.teacher = teacher

    def forward(self, pack: Pack) -> LossSums:
        """Loss sums over the pack's supervised positions; the pack is on the model's device.

        A pack without its teacher's side gives the cross-entropy alone: what validation sends.
        """
        loss, taught = self.loss, {}
        if self.teacher is not None and isinstance(pack, TaughtPack):
            # Before the student's forward: the teacher's activations are gone when the student's are kept.
            taught = self.teacher.targets(pack)
        elif loss.kd_weight > 0:
            assert not self.training, "a training step with kd_weight > 0 needs packs with their teacher's side"
            loss = dataclasses.replace(loss, ce_weight=1.0, kd_weight=0.0)
        hidden = self.hidden_at_supervised(pack)
        return supervised_loss(hidden, self.model.lm_head, pack.labels, loss, **taught)

    def hidden_at_supervised(self, pack: Pack) -> torch.Tensor:
        """Final hidden states (N, D) at the positions whose logits predict a supervised token."""
        return final_hidden(self.model, pack, self.geometry).index_select(0, pack.logit_index)


def _read_preprocessor(path: str) -> dict:
    local = Path(path) / "preprocessor_config.json"
    if not local.exists() and not Path(path).is_dir():
        from transformers.utils import cached_file

        found = cached_file(path, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False)
        local = Path(found) if found else local
    return json.loads(local.read_text()) if local.exists() else {}
