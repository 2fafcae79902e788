"""The table at the start of a run: model, data, parallelism and cost in one look."""

from __future__ import annotations

from rich.table import Table
from torch import nn

from pixelprune.command import plain_console
from pixelprune.selection.registry import is_in_time, is_recoverable
from training.config.settings import Config
from training.loop.context import RunContext
from training.loop.feed import Feed
from training.loop.memory import MemoryPlan
from training.model.parameters import count_parts
from training.model.sharing import describe_sharing


def print_start_table(
    context: RunContext,
    feed: Feed,
    model: nn.Module,
    attention: str,
    memory: MemoryPlan,
    num_steps: int,
    first_step: int,
) -> None:
    """Printed once, by the first rank."""
    config, ranks = context.config, context.ranks
    table = Table(title=config.run.name, show_header=False, title_justify="left")
    table.add_row("model", f"{context.files.path}, {config.model.dtype}, attention {attention}")
    for count in count_parts(model, config.optim):
        layers = f"{count.num_layers} layers of {count.layer_size:,}"
        table.add_row(
            f"  {count.part}", f"{count.num_trained:,} of {count.num_total:,} trained, {layers}, lr {count.lr:g}"
        )
    table.add_row("data", feed.index.describe())
    table.add_row("shared", describe_sharing(config.data, feed.plan_input))
    prune = config.pruning
    along = f" {prune.direction}" if is_in_time(prune) else ""
    table.add_row("pruning", f"{prune.strategy}{along}, metric {prune.metric}, threshold {prune.threshold:g}")
    if config.loss.kd_weight > 0:
        table.add_row("teacher", describe_teacher(config, feed))
    steps = f"{num_steps} of {config.data.samples_per_step} samples"
    table.add_row("steps", steps + (f", continuing after step {first_step}" if first_step else ""))
    table.add_row("parallel", f"{ranks.world_size} ranks on {ranks.device.type}, ZeRO-{config.distributed.zero_stage}")
    # With an online teacher its forward on all tokens is part of it.
    table.add_row("cost", f"{feed.plan_input.cost.mean() / 1e12:.3g} TFLOPs per sample, forward and backward")
    table.add_row("recomputation", memory.policy.describe())
    table.add_row("memory", memory.describe())
    plain_console(stderr=True, width=100).print(table)


def describe_teacher(config: Config, feed: Feed) -> str:
    """Who teaches, how it reaches the student, and how much it counts."""
    loss, path = config.loss, config.kd.path or f"{config.model.path} (the student's initial weights)"
    if feed.targets is not None:
        how = f"cached in {feed.targets.folder}"
    else:
        pixels = "decoded from the student's blocks" if is_recoverable(config.prune) else "sent beside the student's"
        how = f"online, {config.kd.sharding}, its pixels {pixels}"
    weights = f"ce_weight {loss.ce_weight:g}, kd_weight {loss.kd_weight:g}, temperature {loss.temperature:g}"
    if loss.temperature_of_teacher != loss.temperature:
        weights += f", of the teacher {loss.temperature_of_teacher:g}"
    if config.kd.top_k:
        weights += f", of its {config.kd.top_k} most probable tokens"
    own = f", {config.kd.on_policy:.0%} of the samples answered by the student" if config.kd.on_policy else ""
    return f"{path}, {how}; {loss.divergence}, {weights}{own}"
