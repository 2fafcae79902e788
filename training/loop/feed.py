"""What a run is fed: the index of its data, the plan over it, and the loaders for training and validation."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

from pixelprune.flops import CostModel
from pixelprune.model_folder import ModelFolder
from pixelprune.records.limits import RecordLimits
from pixelprune.records.prepare import PrepareSettings
from training.checkpoint.files import complete_checkpoints
from training.config.settings import Config, ScheduleSettings
from training.data.index import Index
from training.data.index_builder import build_index
from training.data.loader import START, Answered, Cursor, LoaderSettings, PackLoader
from training.data.plan import PlanInput, PlanSettings, num_steps
from training.data.settings import SourceSettings
from training.data.sources import HUB, open_source
from training.data.targets import BUILD_ADVICE, TargetReader
from training.distributed.ranks import PATIENCE_MINUTES, Ranks
from training.errors import UserError
from training.loop.context import RunContext
from training.model.sharing import SavedFlops
from training.teacher.files import TeacherPlan, outdated_caches

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Feed:
    """Checked records and the inputs of their plan."""

    index: Index
    prepare: PrepareSettings
    plan_input: PlanInput
    plan_settings: PlanSettings
    targets: TargetReader | None = None
    saved_flops: SavedFlops | None = None

    def num_steps(self, schedule: ScheduleSettings) -> int:
        """Optimizer steps of the whole run: schedule.max_steps, or the epochs' steps."""
        if schedule.max_steps:
            return schedule.max_steps
        whole, part = divmod(schedule.epochs, 1)
        steps = [num_steps(self.plan_input, self.plan_settings, epoch) for epoch in range(int(whole) + (part > 0))]
        if part:
            steps[-1] = max(1, round(steps[-1] * part))
        return sum(steps)

    @property
    def order(self) -> dict[str, Any]:
        """Everything that the order of samples depends on: under another one a cursor means other samples."""
        records = xxhash.xxh3_64()
        for column in (self.index.content_hash, self.plan_input.source, self.plan_input.copies):
            records.update(column.tobytes())
        settings = self.plan_settings
        over_screens: dict[str, Any] = {}
        if settings.max_shared:
            hashes = self.index.picture_hash if settings.over_pictures else self.index.prefix_hash
            records.update(hashes.tobytes())
            setting = "data.share_vision" if settings.over_pictures else "data.share_prefix"
            over_screens = {setting: "group", "data.max_shared": settings.max_shared}
        return {
            "usable records": len(self.index),
            "hash of records and weights": records.hexdigest(),
            "data.samples_per_step": settings.samples_per_step,
            "data.shuffle": settings.shuffle,
            "run.seed": settings.seed,
            **over_screens,
        }

    def continued(self, cursor: Cursor, order_before: dict[str, Any], when_changed: str) -> Cursor:
        """Where a run that stopped at `cursor` under `order_before` goes on.

        when_changed: checkpoint.on_changed_data, what to do where the order is another one now. Raises UserError.
        """
        order = self.order
        changed = [
            f"{name} {order_before.get(name)} -> {order.get(name)}"
            for name in dict.fromkeys((*order, *order_before))
            if order_before.get(name) != order.get(name)
        ]
        if not changed:
            return cursor
        message = f"the order of samples is not the checkpoint's any more ({', '.join(changed)})"
        if when_changed == "stop":
            raise UserError(
                f"{message}, so samples would be repeated and left out; set back what changed (data, caps, weights, "
                "run.seed), start anew under another run.name, or go on with a new epoch: "
                "checkpoint.on_changed_data=next_epoch"
            )
        following = Cursor(cursor.epoch + (cursor.step > 0), 0)
        logger.warning("%s; going on at the start of epoch %d (checkpoint.on_changed_data)", message, following.epoch)
        return following


def build_feed(
    context: RunContext, sources: list[SourceSettings], *, shuffle: bool, teacher_plan: TeacherPlan | None = None
) -> Feed:
    """Index the sources (all ranks together), refuse too much bad data, and set up the plan.

    teacher_plan: packs bring the teacher's side with them. The records are then those that fit unpruned too, with a
    cached teacher as with an online one: the two train on the same samples.
    A request to stop, of any rank, ends the index early on all ranks with StopAskedError. Raises UserError for anything
    about the data that the user must fix.
    """
    config, ranks, folder, files = context.config, context.ranks, context.folder, context.files
    data = config.data
    prepare = prepare_settings(config, files)
    if teacher_plan is not None and config.kd.on_policy:
        prepare = dataclasses.replace(prepare, takes_open=True)
    ask_hub_once(sources, data.index_dir, ranks)
    try:
        index = build_index(
            sources,
            prepare,
            index_dir=data.index_dir,
            num_workers=data.index_workers or ranks.cores_per_rank,
            rank=ranks.rank,
            world_size=ranks.world_size,
            barrier=lambda: ranks.barrier(PATIENCE_MINUTES),
            show_progress=ranks.is_first,
            # A run that continues keeps its records: an image fixed meanwhile would change the order of all samples.
            recheck=not complete_checkpoints(folder / "checkpoints"),
            is_stopped=lambda: context.is_asked_to_stop,
            any_rank=ranks.any,
            max_seconds=data.max_seconds_per_record,
        )
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error
    index = _checked(context, index, shuffle=shuffle, with_teacher=teacher_plan is not None)
    cost = cost_model(config, files.config)
    plan_settings = PlanSettings(
        samples_per_step=data.samples_per_step,
        pack_tokens=data.pack_tokens,
        pack_patches=data.pack_patches,
        shuffle=shuffle and data.shuffle,
        seed=config.run.seed,
        max_shared=data.max_shared if "group" in (data.share_prefix, data.share_vision) else 0,
        over_pictures=data.share_vision == "group",
    )
    if teacher_plan is None:
        return Feed(index, prepare, index.plan_input(cost), plan_settings, saved_flops=SavedFlops(cost))
    if teacher_plan.targets is not None:
        _require_targets(index, teacher_plan.targets)
        plan_input = index.plan_input(cost)
        return Feed(index, prepare, plan_input, plan_settings, teacher_plan.targets, SavedFlops(cost))
    teacher_cost = CostModel.from_config(teacher_plan.files.config)
    plan_input = index.plan_input(cost, with_teacher=True, teacher_cost=teacher_cost)
    if config.kd.on_policy:
        plan_input = _with_room_for_answers(plan_input, config.kd.on_policy_max_new_tokens, data.pack_tokens)
    prepare = dataclasses.replace(prepare, with_full=True)
    return Feed(index, prepare, plan_input, plan_settings, saved_flops=SavedFlops(cost, teacher_cost))


def ask_hub_once(sources: list[SourceSettings], index_dir: str, ranks: Ranks) -> None:
    """Data sets of the hub are fetched by one rank, for all that share its cache or its fate. Every rank calls this."""
    remote = [source for source in sources if HUB.fullmatch(source.path)]

    def ask() -> None:
        for source in remote:
            logger.info("%s: asking the hub for it", source.path)
            try:
                open_source(source, index_dir)
            except ValueError as error:
                raise UserError(str(error)) from error

    if remote:
        ranks.from_first(ask)


def _with_room_for_answers(inputs: PlanInput, max_new_tokens: int, pack_tokens: int) -> PlanInput:
    """Any record may become as long as the student writes. One that fills a pack alone may exceed it by that."""
    longer = np.maximum(max_new_tokens - inputs.num_supervised, 0)
    return dataclasses.replace(
        inputs, tokens=np.minimum(inputs.tokens + longer, np.maximum(inputs.tokens, pack_tokens))
    )


def _checked(context: RunContext, index: Index, *, shuffle: bool, with_teacher: bool) -> Index:
    """What can be trained on; the first rank writes the rest down. Raises UserError on all ranks."""
    report = context.folder / f"quarantine{'' if shuffle else '_eval'}.jsonl"

    def check() -> Index:
        try:
            return index.checked(
                context.config.data,
                report,
                with_teacher=with_teacher,
                write_report=context.ranks.is_first,
                go_on=context.config.checkpoint.on_error == "continue",
            )
        except UserError:
            raise
        except ValueError as error:
            raise UserError(str(error)) from error

    return context.ranks.agree(check)


def prepare_settings(config: Config, files: ModelFolder) -> PrepareSettings:
    """How a record becomes a sample in this run."""
    data = config.data
    return PrepareSettings(
        files.path,
        config.prune,
        config.resize,
        data.last_turn_only,
        ignore_keys=tuple(data.ignore_keys),
        supervise_empty_reasoning=data.supervise_empty_reasoning,
        answer_format=data.answer_format,
        grounding_tokens=data.grounding_tokens,
        trust_remote_code=config.model.trust_remote_code,
        limits=RecordLimits(data.max_file_bytes, data.max_text_chars, data.max_turns, data.max_images),
    )


def training_loader(
    context: RunContext,
    feed: Feed,
    *,
    num_steps: int,
    cursor: Cursor = START,
    first_step: int = 0,
    dummy_image: bool = True,
    answered: Answered | None = None,
) -> PackLoader:
    """This rank's packs of a run.

    num_steps: of the whole run; cursor, first_step: where it goes on, and how many steps were done before.
    answered: makes the packs of a run in which the student answers some of its samples (kd.on_policy).
    dummy_image: needed unless all ranks run their backward, and a sharded teacher, without the vision tower.
    """
    return PackLoader(
        feed.index,
        feed.plan_input,
        feed.plan_settings,
        feed.prepare,
        context.files.geometry,
        _loader_settings(context, "quarantine", dummy_image=dummy_image),
        rank=context.ranks.rank,
        world_size=context.ranks.world_size,
        cursor=cursor,
        num_steps=num_steps,
        first_step=first_step,
        sum_over_ranks=context.ranks.sum,
        targets=feed.targets,
        saved_flops=feed.saved_flops,
        on_policy=context.config.kd.on_policy if answered else 0.0,
        answered=answered,
    )


def validation_loader(context: RunContext, feed: Feed) -> PackLoader:
    """Every record once, whatever the weights, in plan order; ranks without work get a dummy."""
    once = dataclasses.replace(feed.plan_input, copies=np.ones(len(feed.plan_input)))
    return PackLoader(
        feed.index,
        once,
        feed.plan_settings,
        feed.prepare,
        context.files.geometry,
        _loader_settings(context, "quarantine_eval", dummy_image=False),
        rank=context.ranks.rank,
        world_size=context.ranks.world_size,
        sum_over_ranks=context.ranks.sum,
    )


def _loader_settings(context: RunContext, report: str, *, dummy_image: bool) -> LoaderSettings:
    data = context.config.data
    is_training = report == "quarantine"  # the held-out loader would say it again
    if is_training and not data.num_workers and data.max_seconds_per_record and context.ranks.is_first:
        logger.warning(
            "data.num_workers=0: records are prepared in the training process, which cannot end one that hangs "
            "(data.max_seconds_per_record holds for the index alone)"
        )
    return LoaderSettings(
        num_workers=data.num_workers,
        prefetch_packs=data.prefetch_packs,
        dummy_image=dummy_image,
        share_prefix=data.share_prefix != "off",
        share_vision=data.share_vision != "off",
        device=context.ranks.device,
        max_quarantined_share=data.max_quarantined_share,
        report=context.folder / f"{report}_rank{context.ranks.rank}.jsonl",
    )


def cost_model(config: Config, hf_config: Any) -> CostModel:
    """The student's: a vision tower without anything to train needs no backward pass.

    Adapters need the backward pass of their tower; that they save its weight gradients is not counted.
    """
    trains_vit = config.lora.vit if config.lora.rank else not config.optim.vit.freeze
    return CostModel.from_config(hf_config, freeze_vit=not trains_vit)


def _require_targets(index: Index, targets: TargetReader) -> None:
    """UserError unless the cache holds every record."""
    missing = np.flatnonzero(~targets.has(index.content_hash))
    if len(missing):
        old = outdated_caches(targets.folder)
        refused = f"; not read: {', '.join(old)}, whose content hashes say less of a record" if old else ""
        raise UserError(
            f"{len(missing)} of {len(index)} records have no teacher targets in {targets.folder}, the first is "
            f"{index.record_id(int(missing[0]))!r}; {BUILD_ADVICE}, or set kd.source=online{refused}"
        )
