"""What a recipe may say: the range of every field, and what fields may not say together. One line names the field."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from pixelprune.records.keys import STRUCTURE
from training.config.settings import ATTENTION_NAMES, AUTO, Config, ConfigError


class _Range(NamedTuple):
    expected: str
    holds: Callable[[Any], bool]


def _at_least(lowest: float, note: str = "") -> _Range:
    return _Range(f"at least {lowest}{note}", lambda value: lowest <= value < math.inf)


def _one_of(*allowed: Any) -> _Range:
    return _Range(f"one of {', '.join(map(str, allowed))}", lambda value: value in allowed)


_POSITIVE = _Range("a number > 0", lambda value: 0 < value < math.inf)
_SHARE = _Range("a number from 0 to 1", lambda value: 0 <= value <= 1)
_BELOW_1 = _Range("a number >= 0 and < 1", lambda value: 0 <= value < 1)
_EVERY_K = _Range(
    f"{AUTO} (chosen at the start), 0 (no layer), 1 (every layer) or k (every k-th)", lambda value: value >= AUTO
)
_PRECISION = _one_of("", "bfloat16", "float32")
_FOLDER_NAME = _Range(
    "a folder name of at most 200 bytes",  # file systems take 255; the longest name made of it adds 20
    lambda value: value not in ("", ".", "..") and not set(value) & {"/", "\0"} and len(value.encode()) <= 200,
)

RANGES: dict[str, _Range] = {
    "run.name": _FOLDER_NAME,
    "run.seed": _at_least(0),
    "model.path": _Range("a Hugging Face model folder or hub id", bool),
    "model.dtype": _one_of("bfloat16", "float32"),
    "model.attention": _one_of(*ATTENTION_NAMES),
    "model.recompute_vit": _EVERY_K,
    "model.recompute_llm": _EVERY_K,
    "model.compile_max_recompiles": _at_least(1),
    "data.ignore_keys": _Range("keys that are not the conversation itself", lambda keys: not STRUCTURE & set(keys)),
    "data.sources": _Range("at least one data set", bool),
    "data.samples_per_step": _at_least(1),
    "data.pack_tokens": _at_least(1),
    "data.pack_patches": _at_least(4, " (one block)"),
    "data.max_quarantined_share": _SHARE,
    "data.index_workers": _at_least(0),
    "data.num_workers": _at_least(0),
    "data.prefetch_packs": _at_least(0),
    "kd.source": _one_of("online", "cached"),
    "kd.sharding": _one_of("replica", "zero3"),
    "kd.dtype": _PRECISION,
    "kd.cache_dtype": _PRECISION,
    "kd.cache_records": _at_least(1),
    "kd.top_k": _at_least(0, " (0 = hidden states)"),
    "optim.lr": _POSITIVE,
    "optim.vit.lr": _POSITIVE,
    "optim.merger.lr": _POSITIVE,
    "optim.llm.lr": _POSITIVE,
    "optim.weight_decay": _at_least(0),
    "optim.beta1": _BELOW_1,
    "optim.beta2": _BELOW_1,
    "optim.eps": _POSITIVE,
    "optim.max_skipped_in_a_row": _at_least(1),
    "optim.max_grad_norm": _at_least(0, " (0 = no clipping)"),
    "lora.rank": _at_least(0, " (0 = no adapters)"),
    "lora.alpha": _POSITIVE,
    "lora.dropout": _BELOW_1,
    "schedule.max_steps": _at_least(0, " (0 = schedule.epochs decides)"),
    "schedule.epochs": _at_least(0),
    "schedule.warmup_steps": _at_least(0),
    "schedule.min_lr_ratio": _SHARE,
    "distributed.zero_stage": _one_of(1, 2),
    "distributed.threads_per_rank": _at_least(0),
    "distributed.timeout_minutes": _POSITIVE,
    "distributed.reduce_bucket_size": _at_least(1),
    "checkpoint.every_steps": _at_least(0),
    "checkpoint.keep_last": _at_least(1),
    "checkpoint.keep_every_steps": _at_least(0),
    "checkpoint.on_error": _one_of("stop", "continue"),
    "checkpoint.on_broken": _one_of("fall_back", "stop"),
    "checkpoint.on_changed_data": _one_of("stop", "next_epoch"),
    "checkpoint.save_timeout_minutes": _POSITIVE,
    "tracking.wandb": _one_of("auto", "online", "offline", "disabled"),
    "tracking.log_every": _at_least(1),
    "eval.every_steps": _at_least(0),
    "eval.grounding_every_steps": _at_least(0),
    "eval.grounding_samples": _at_least(0, " (0 = all)"),
    "eval.grounding_batch_size": _at_least(1),
    "eval.grounding_max_new_tokens": _at_least(1),
}
"""Dotted field -> its values. None, where a field's type allows it, is always allowed."""

PASSTHROUGH: dict[str, tuple[str, ...]] = {
    "comms_logger": (),
    "flops_profiler": (),
    "wall_clock_breakdown": (),
    "memory_breakdown": (),
    "dump_state": (),
    "tensorboard": (),
    "csv_monitor": (),
    "comet": (),
    "communication_data_type": (),
    "zero_optimization": ("reduce_scatter", "allgather_partitions"),
}
"""DeepSpeed's settings that distributed.deepspeed may hold, and of a section all keys (empty) or these.

They observe, or choose how the same sums travel. What is absent changes the arithmetic (fp16, sparse_gradients,
gradient_predivide_factor), or where ZeRO keeps whose weights (round_robin_gradients, offload_optimizer), on which the
named pieces of a checkpoint rest; or it is generated from other sections of the recipe.
"""


def check_config(config: Config) -> None:
    """Raises ConfigError for a value out of its range and for fields that contradict each other."""
    for name, allowed in RANGES.items():
        value = _value(config, name)
        if value is not None and not allowed.holds(value):
            raise ConfigError(f"{name}: expected {allowed.expected}, got {value!r}")
    check_passthrough(config.distributed.deepspeed)
    for message in _contradictions(config):
        raise ConfigError(message)


def check_passthrough(settings: dict[str, Any]) -> None:
    """Raises ConfigError for a DeepSpeed setting that may not be handed on."""
    for name, allowed in _refused(settings):
        raise ConfigError(
            f"distributed.deepspeed.{name}: may change what is computed or what a checkpoint holds, or is generated "
            f"from other sections of the recipe; allowed here: {', '.join(allowed)}"
        )


def _refused(settings: dict[str, Any]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(dotted setting, what would be allowed in its place)"""
    for section, value in settings.items():
        keys = PASSTHROUGH.get(section)
        if keys is None or (keys and not isinstance(value, dict)):
            yield section, tuple(PASSTHROUGH)
        elif keys:
            yield from ((f"{section}.{key}", keys) for key in value if key not in keys)


def _value(config: Config, dotted: str) -> Any:
    value: Any = config
    for part in dotted.split("."):
        value = getattr(value, part)
    return value


def _contradictions(config: Config) -> Iterator[str]:
    """One message for each pair of fields that cannot stand together."""
    optim, lora, schedule, kd = config.optim, config.lora, config.schedule, config.kd
    if config.distributed.zero_stage == 1 and config.model.dtype == "bfloat16":
        yield (
            "distributed.zero_stage: with 1 in bfloat16 DeepSpeed takes an optimizer whose state cannot be saved by "
            "name; set distributed.zero_stage=2, or model.dtype=float32"
        )
    if kd.top_k and kd.source != "cached":
        yield f"kd.top_k: {kd.top_k} log-probabilities are kept in a cache; set kd.source=cached, or kd.top_k=0"
    if not schedule.max_steps and not schedule.epochs:
        yield "schedule: expected max_steps > 0 or epochs > 0, got neither"
    if schedule.max_steps and schedule.warmup_steps > schedule.max_steps:
        yield (
            f"schedule.warmup_steps: expected at most schedule.max_steps={schedule.max_steps}, "
            f"got {schedule.warmup_steps}"
        )
    if not lora.rank and optim.vit.freeze and optim.merger.freeze and optim.llm.freeze:
        yield "optim: vit, merger and llm are all frozen; nothing is left to train"
    if lora.rank and not (lora.llm or lora.vit):
        yield "lora: rank is above 0 but neither lora.llm nor lora.vit is on"
    if lora.rank and lora.train_merger and optim.merger.freeze:
        yield "lora.train_merger=true contradicts optim.merger.freeze=true; set one of them to false"
