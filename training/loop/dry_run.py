"""What of a run can be checked without a GPU and without training: `python -m launch RECIPE --dry-run`."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForImageTextToText

from pixelprune.model_folder import ModelFolder, is_hub_id
from pixelprune.records.prepare import Preparer
from pixelprune.records.record import RecordError
from training.config.settings import AUTO, Config
from training.data.inspection import spread
from training.data.settings import DataSettings, SourceSettings
from training.data.sources import HUB, Source, open_sources
from training.errors import UserError
from training.loop.feed import prepare_settings
from training.loop.memory import Recomputation, estimate_memory, is_estimated, state_bytes, teacher_weights
from training.model.loading import load_model_files
from training.model.lora import add_adapters
from training.model.parameters import freeze_parts
from training.teacher.files import TeacherPlan, load_teacher_files

NUM_SAMPLES = 8
"""Records of a source, evenly over it, that are prepared as in training."""


def dry_run(config: Config, console: Console, *, num_ranks: int, on_gpu: bool) -> None:
    """Print what was found of model, data and memory. Raises UserError for what would end a start.

    num_ranks: over which ZeRO shards. on_gpu: whether the run would use GPUs, not whether there is one here.
    """
    files = load_model_files(config.model)
    table = Table(title=f"{config.run.name}: checked without a GPU", show_header=False, title_justify="left")
    table.add_row("model", f"{files.path}, {files.config.model_type}, {config.model.dtype}")
    preparer = prepare_settings(config, files).build()
    for what, settings in (("data", config.data.sources), ("held-out data", config.data.eval_sources)):
        for name, said in _look_at(settings, preparer, config.data):
            table.add_row(what, f"{name}: {said}")
    for line in _memory(config, files, num_ranks, "varlen" if on_gpu else "sdpa"):
        table.add_row("memory of a rank", line)
    console.print(table)


def missing_paths(config: Config) -> list[str]:
    """One line for each path of a recipe that is neither here nor on a hub."""
    paths = [("model.path", config.model.path, is_hub_id(config.model.path))]
    if config.loss.kd_weight > 0 and config.kd.path:
        paths.append(("kd.path", config.kd.path, is_hub_id(config.kd.path)))
    for key, sources in (("data.sources", config.data.sources), ("data.eval_sources", config.data.eval_sources)):
        for number, source in enumerate(sources):
            paths.append((f"{key}.{number}.path", source.path, HUB.fullmatch(source.path) is not None))
    return [
        f"{key}: there is no {path} here" for key, path, is_remote in paths if not (is_remote or Path(path).exists())
    ]


def _look_at(settings: list[SourceSettings], preparer: Preparer, data: DataSettings) -> list[tuple[str, str]]:
    """(name, what was found) of every source. Raises UserError for one of which no sampled record can be used."""
    if not settings:
        return []
    try:
        sources = open_sources(settings, data.index_dir)
    except (ValueError, OSError) as error:
        raise UserError(str(error).splitlines()[0]) from error
    return [(source.name, _sampled(source, preparer, data.max_quarantined_share)) for source in sources]


def _sampled(source: Source, preparer: Preparer, max_share: float) -> str:
    rows = spread(len(source), NUM_SAMPLES)
    num_tokens = kept = full = 0
    refused = []
    for row in rows:
        record_id = source.record_id(row)
        try:
            sample = source.prepared(row, preparer).sample
        except RecordError as error:
            refused.append(f"{record_id}: {error.reason}: {error}")
            continue
        num_tokens += len(sample)
        kept += sum(image.selection.num_kept for image in sample.images)
        full += sum(image.num_full_blocks for image in sample.images)
    if len(refused) == len(rows):
        raise UserError(f"source {source.settings.path}: none of {len(rows)} sampled records can be used; {refused[0]}")
    said = (
        f"{len(source)} records; of {len(rows)} sampled {num_tokens / (len(rows) - len(refused)):.0f} tokens on average"
    )
    said += f", {kept / full:.1%} of the blocks kept" if full else ", no images"
    if refused:
        said += f"; {len(refused)} of them would be quarantined, {refused[0]}; no run starts with a share of more than "
        said += f"data.max_quarantined_share={max_share:g}"
    return said


def _memory(config: Config, files: ModelFolder, num_ranks: int, attention_for_auto: str) -> list[str]:
    """The estimate of `training.loop.memory` from the model's config alone: with as little recomputed as the recipe
    allows, and with as much."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(files.config, trust_remote_code=config.model.trust_remote_code)
    freeze_parts(model, config.optim)
    add_adapters(model, config.lora)
    if not is_estimated(files.config):
        states = state_bytes(config, model, num_ranks)
        listed = ", ".join(f"{name} {size / 1e9:.3g}" for name, size in states.items())
        return [f"{sum(states.values()) / 1e9:.3g} GB ({listed}) and activations, which are not estimated here"]
    teacher = None
    if config.loss.kd_weight > 0 and config.kd.source == "online":
        teacher = TeacherPlan(load_teacher_files(config.kd, config.model, files))
    attention = config.model.attention if config.model.attention != "auto" else attention_for_auto
    asked = (config.model.recompute_vit, config.model.recompute_llm)
    policies = [Recomputation(*(extreme if every == AUTO else every for every in asked)) for extreme in (0, 1)]
    lines = []
    for policy in dict.fromkeys(policies):
        estimate = estimate_memory(
            config,
            model,
            policy,
            world_size=num_ranks,
            attention=attention,
            teacher_weights=teacher_weights(config, model, teacher, num_ranks),
        )
        lines.append(f"{estimate.describe()}; recomputing {policy.describe()}")
    return lines
