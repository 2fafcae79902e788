"""What a recipe may not say: fields that contradict each other, and what DeepSpeed may not be told. One line each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pixelprune.selection import check_settings
from training.config.settings import Config, ConfigError

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
    """Raises ConfigError for what is missing, and for fields that contradict each other."""
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


def _contradictions(config: Config) -> Iterator[str]:
    """One message for each pair of fields that cannot stand together."""
    optim, lora, schedule, kd = config.optim, config.lora, config.schedule, config.kd
    if not config.model.path:
        yield "model.path: expected a Hugging Face model folder or hub id, got ''"
    if not config.data.sources:
        yield "data.sources: expected at least one data set, got []"
    if config.data.share_prefix == config.data.share_vision == "group":
        yield (
            "data.share_vision: group orders records by their picture, data.share_prefix=group by all they begin with; "
            "set one of them to step, which shares what meets"
        )
    if config.data.share_vision != "off" and kd.sharding == "zero3" and config.loss.kd_weight > 0:
        yield (
            f"data.share_vision={config.data.share_vision}: ranks that fetch a teacher's weights from each other run "
            "it in one call, which encodes every image; set kd.sharding=replica, or data.share_vision=off"
        )
    if config.distributed.zero_stage == 1 and config.model.dtype == "bfloat16":
        yield (
            "distributed.zero_stage: with 1 in bfloat16 DeepSpeed takes an optimizer whose state cannot be saved by "
            "name; set distributed.zero_stage=2, or model.dtype=float32"
        )
    try:
        check_settings(config.prune)
    except ValueError as error:
        yield str(error)
    prune, baselines = config.prune, ("random", "conncomp", "conncomp_cover", "resize")
    if prune.budget != "pred2d" and prune.strategy not in baselines:
        yield f"prune.budget={prune.budget}: belongs to {', '.join(baselines)}, got prune.strategy={prune.strategy}"
    elif "pred3d" not in (prune.strategy, prune.budget):
        if prune.direction != "auto":
            yield f"prune.direction={prune.direction}: belongs to prune.strategy=pred3d, got {prune.strategy}"
        if not prune.keep_replaced:
            yield f"prune.keep_replaced=false: belongs to prune.strategy=pred3d, got {prune.strategy}"
    if kd.on_policy and (kd.source != "online" or not config.loss.kd_weight):
        yield (
            f"kd.on_policy: the student's own answers ({kd.on_policy:g} of the samples) are graded by a teacher that "
            "runs beside it; set kd.source=online and loss.kd_weight above 0, or kd.on_policy=0"
        )
    for number, source in enumerate(config.data.eval_sources):
        if source.loss_weight != 1:
            yield f"data.eval_sources.{number}.loss_weight: expected 1 (held-out losses are not weighted by source)"
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
