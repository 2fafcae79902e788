"""A teacher's files without its weights in memory: does it fit the student, what is it exactly, and its output head."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import safe_open
from torch import nn

from pixelprune.files import write_whole
from pixelprune.model_folder import ModelFolder
from pixelprune.records.prepare import PrepareSettings
from training.config.settings import ConfigError, ModelSettings
from training.config.teacher import TeacherSettings
from training.data.targets import TargetReader
from training.distributed.ranks import Ranks
from training.errors import UserError
from training.loss.supervised import LossSettings
from training.model.fingerprint import hash_weights, local_folder
from training.model.loading import DTYPES, load_model_files, load_model_files_once
from training.model.tensor_files import weight_paths

FORMAT_VERSION = 2
"""Raise when the meaning of a cached value, or of the hash that finds it, changes: older caches are then foreign.
2: the hash covers turn weights, tools, reasoning and stated image sizes."""


@dataclass(frozen=True)
class TeacherPlan:
    """Which teacher, and how packs get the teacher's side: full rows, or targets read from a cache."""

    files: ModelFolder
    targets: TargetReader | None = None


def plan_teacher(
    kd: TeacherSettings,
    model: ModelSettings,
    loss: LossSettings,
    prepare: PrepareSettings,
    student: ModelFolder,
    ranks: Ranks,
) -> TeacherPlan | None:
    """None without distillation. Every rank calls this. Raises ConfigError for a teacher that does not fit.

    prepare: how the student's samples are made, on which cached targets depend.
    """
    if loss.kd_weight == 0:
        return None
    files = load_teacher_files(kd, model, student, ranks)
    if kd.source == "online":
        return TeacherPlan(files)
    folder = cache_folder(kd, model, loss, prepare, files, student, ranks)
    return TeacherPlan(files, TargetReader(folder, _vocab_size(student)))


def load_teacher_files(
    kd: TeacherSettings, model: ModelSettings, student: ModelFolder, ranks: Ranks | None = None
) -> ModelFolder:
    """The teacher's config, tokenizer and preprocessor; refuses one that does not fit. Raises ConfigError.

    ranks: all of them call this, and one asks the hub first.
    """
    if kd.path in ("", student.path):
        return student
    settings = dataclasses.replace(model, path=kd.path)
    files = load_model_files_once(settings, ranks, "kd.path") if ranks else load_model_files(settings, "kd.path")
    # The student's packs are the teacher's input: both must read ids and pixels alike.
    for what, mine, other in (
        ("output vocabulary", _vocab_size(student), _vocab_size(files)),
        ("tokenizer", student.tokenizer.get_vocab(), files.tokenizer.get_vocab()),  # type: ignore[attr-defined]
        ("vision input", student.geometry, files.geometry),
    ):
        if mine != other:
            detail = f": {other} instead of {mine}" if not isinstance(mine, dict) else ""
            raise ConfigError(
                f"kd.path: {files.path} has another {what} than the student {student.path}{detail}; "
                "choose a teacher of the same family"
            )
    return files


def teacher_dtype(kd: TeacherSettings, model: ModelSettings) -> torch.dtype:
    return DTYPES[kd.dtype or model.dtype]


def cache_folder(
    kd: TeacherSettings,
    model: ModelSettings,
    loss: LossSettings,
    prepare: PrepareSettings,
    teacher: ModelFolder,
    student: ModelFolder,
    ranks: Ranks,
) -> Path:
    """The folder of this teacher's targets, made if need be; every rank calls this, the first one reads the weights."""

    def make() -> Path:
        text = json.dumps(describe_targets(kd, model, loss, prepare, teacher, student), indent=2, sort_keys=True)
        folder = Path(kd.cache_dir) / xxhash.xxh3_64(text.encode()).hexdigest()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / "teacher.json", f"{text}\n".encode())
        except OSError as error:
            raise ConfigError(f"kd.cache_dir: {folder} cannot be written: {error.strerror}") from error
        return folder

    return ranks.from_first(make)


def outdated_caches(folder: Path) -> list[str]:
    """The caches beside this one that an older version of the framework wrote, which it takes no target from."""
    found = []
    for path in sorted(folder.parent.glob("*/teacher.json")):
        try:
            version = json.loads(path.read_text())["version"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if version != FORMAT_VERSION and any(path.parent.glob("*.safetensors")):
            found.append(f"{path.parent} (format {version}, expected {FORMAT_VERSION})")
    return found


def describe_targets(
    kd: TeacherSettings,
    model: ModelSettings,
    loss: LossSettings,
    prepare: PrepareSettings,
    teacher: ModelFolder,
    student: ModelFolder,
) -> dict[str, Any]:
    """All that a cached target depends on besides its record; not pruning, since the teacher sees all tokens."""
    sample = prepare.fingerprint(prepare.build_from(student))
    # Ignored keys are no part of a record, nor of its content hash; how objects are written is, as text.
    for name in ("prune", "ignore_keys", "answer_format", "grounding_tokens"):
        del sample[name]
    top_k = {"top_k": kd.top_k, "temperature": loss.temperature_of_teacher}
    stored = kd.cache_dtype or kd.dtype or model.dtype
    return {
        "version": FORMAT_VERSION,
        "weights": _hash_teacher(teacher.path),
        "computed_in": str(teacher_dtype(kd, model)).removeprefix("torch."),
        "values": top_k if kd.top_k else {"hidden": stored},
        "geometry": dataclasses.asdict(teacher.geometry),
        **sample,
    }


def _hash_teacher(path: str) -> str:
    try:
        return hash_weights(path)
    except UserError as error:
        raise _no_weights(error) from error


def _no_weights(error: UserError) -> ConfigError:
    return ConfigError(f"kd.path: {error}; save the teacher with save_pretrained")


def weight_files(path: str) -> list[Path]:
    """The safetensors files of a model folder or of a hub id that was downloaded. Raises ConfigError if it has none."""
    try:
        return weight_paths(local_folder(path))
    except UserError as error:
        raise _no_weights(error) from error


def load_head(files: ModelFolder, dtype: torch.dtype, device: torch.device) -> nn.Linear:
    """The output head alone, frozen: one tensor is read from the files, the embedding where they hold no other head.

    Raises ConfigError when there is no such tensor.
    """
    is_tied = bool(getattr(files.config, "tie_word_embeddings", False))
    # A head in the files of a tied model is used by the stock model too: it is the same, or the config is wrong.
    endings = ["lm_head.weight"] + (["language_model.embed_tokens.weight"] if is_tied else [])
    names: dict[str, Path] = {}
    for path in weight_files(files.path):
        with safe_open(path, framework="pt") as tensors:
            names |= dict.fromkeys(tensors.keys(), path)
    for ending in endings:
        if name := next((name for name in names if name.endswith(ending)), None):
            with safe_open(names[name], framework="pt") as tensors:
                weight = tensors.get_tensor(name).to(device, dtype)
            head = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            head.weight = nn.Parameter(weight, requires_grad=False)
            return head
    raise ConfigError(f"kd.path: the files of {files.path} hold no tensor {endings[-1]!r}, the output head")


def _vocab_size(files: ModelFolder) -> int:
    return files.config.get_text_config().vocab_size  # type: ignore[attr-defined]
