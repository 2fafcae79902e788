"""The frozen teacher of a run: the same model on all tokens, online or from a cache.

    N = supervised tokens of a pack, D = the teacher's width

A teacher is no nn.Module, and the student holds it as a plain attribute: optimizer, checkpoint and export see none of
its weights.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import deepspeed
import torch
from torch import nn
from transformers import PreTrainedModel

from pixelprune.model_call import final_hidden
from pixelprune.model_folder import ModelFolder
from pixelprune.pack import Pack, VisionGeometry
from training.config.settings import ModelSettings
from training.config.teacher import TeacherSettings
from training.data.distillation import DistillationPack
from training.distributed.ranks import Ranks
from training.loss.supervised import LossSettings
from training.model.attention import attention_for
from training.model.loading import load_model
from training.model.sharing import check_sharing
from training.model.supervised import Teacher
from training.teacher.files import TeacherPlan, load_head, teacher_dtype
from training.teacher.top_k import TopK


def build_teacher(
    kd: TeacherSettings,
    model: ModelSettings,
    loss: LossSettings,
    plan: TeacherPlan | None,
    ranks: Ranks,
    attention: str,
    share_prefix: str = "off",
) -> Teacher | None:
    """The teacher that the recipe asks for, on this rank's device; None without distillation. Every rank calls this.

    share_prefix: of the packs that it will be given. Raises UserError where it could not compute them.
    """
    if plan is None:
        return None
    if plan.targets is not None:
        head = None if kd.top_k else load_head(plan.files, teacher_dtype(kd, model), ranks.device)
        return CachedTeacher(head)
    teacher = build_online_teacher(kd, model, plan.files, ranks, attention, share_prefix)
    teacher.top_k = TopK(kd.top_k, loss) if kd.top_k else None
    return teacher


def build_online_teacher(
    kd: TeacherSettings,
    model: ModelSettings,
    files: ModelFolder,
    ranks: Ranks,
    attention: str,
    share_prefix: str = "off",
) -> OnlineTeacher:
    """The teacher's weights, frozen; kd.sharding says how the ranks hold them. share_prefix: as in `build_teacher`."""
    attention = attention_for(teacher_dtype(kd, model), ranks.device, attention)
    is_sharded = kd.sharding == "zero3" and ranks.world_size > 1
    check_sharing(share_prefix, files.config, attention, is_sharded=is_sharded)
    if is_sharded:
        return _build_sharded(kd, model, files, ranks, attention)
    teacher = _load_frozen(kd, model, files, ranks.device, attention)
    return OnlineTeacher(teacher, teacher.lm_head, files.geometry)


class OnlineTeacher:
    """Runs on the full row of every pack, without gradients.

    top_k: say only so many log-probabilities, as a cache with kd.top_k does; None says all.
    """

    def __init__(self, model: PreTrainedModel, head: nn.Module, geometry: VisionGeometry, *, is_sharded: bool = False):
        self.model, self.head, self.geometry, self.is_sharded = model, head, geometry, is_sharded
        self.top_k: TopK | None = None

    def targets(self, pack: DistillationPack) -> dict[str, Any]:
        hidden = self.hidden(pack.full_pack())
        if self.top_k is not None:
            return {"teacher_topk": self.top_k.of(hidden, self.head)}
        return {"teacher_hidden": hidden, "teacher_head": self.head}

    @torch.no_grad()
    def hidden(self, full: Pack) -> torch.Tensor:
        """Final hidden states (N, D) at the positions of a full row that predict its supervised tokens."""
        if full.num_supervised == 0 and not self.is_sharded:
            # A rank without work. Sharded ranks fetch each other's layers, so there all of them run.
            weight = self.head.weight
            return weight.new_empty(0, weight.shape[1])
        hidden = final_hidden(self.model, full, self.geometry, in_one_call=self.is_sharded)
        return hidden.index_select(0, full.logit_index)


class CachedTeacher:
    """Hands out what the loader read from the cache; of the teacher itself only the output head is here."""

    def __init__(self, head: nn.Module | None):
        self.head = head

    def targets(self, pack: DistillationPack) -> dict[str, Any]:
        if self.head is None:
            return {"teacher_topk": (pack.teacher_log_probs, pack.teacher_ids)}
        return {"teacher_hidden": pack.teacher_hidden, "teacher_head": self.head}


def _load_frozen(
    kd: TeacherSettings, model: ModelSettings, files: ModelFolder, device: torch.device, attention: str
) -> PreTrainedModel:
    settings = dataclasses.replace(model, path=files.path, dtype=kd.dtype or model.dtype)
    return load_model(settings, attention=attention, device=device).eval().requires_grad_(False)


def _build_sharded(
    kd: TeacherSettings, model: ModelSettings, files: ModelFolder, ranks: Ranks, attention: str
) -> OnlineTeacher:
    """ZeRO-3 inference: every rank keeps 1 / world size of the weights and fetches a layer's others for its forward.

    The output head stays whole on every rank: how often the loss uses it depends on a rank's number of chunks, and
    ranks that fetch must fetch equally often.
    """
    dtype = teacher_dtype(kd, model)
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": 0,
            # It would exchange torch's linear layer for the whole process, the student's too.
            "memory_efficient_linear": False,
        },
        "bf16": {"enabled": dtype == torch.bfloat16},
        "steps_per_print": 2**31,
    }
    head = load_head(files, dtype, ranks.device)
    # Whole in host memory, then divided tensor by tensor: the device never holds more than its share and the layers in
    # use. Left to itself, `initialize` would move the whole model there first; buffers are not divided.
    teacher = _load_frozen(kd, model, files, torch.device("cpu"), attention)
    deepspeed.zero.Init(module=teacher.model, config_dict_or_path=settings)
    teacher.model.to(ranks.device)
    teacher.model, *_ = deepspeed.initialize(model=teacher.model, config=settings)
    teacher.eval()
    return OnlineTeacher(teacher, head, files.geometry, is_sharded=True)
