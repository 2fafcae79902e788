"""Records -> answers -> predictions: the batched, left-padded generation that evaluation is made of.

The same functions serve `python -m training.evaluate` and evaluation inside training.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import xxhash
from transformers import StoppingCriteria, StoppingCriteriaList

from pixelprune.flops import CostModel
from pixelprune.hf import PrunedInputs, generate, prepare
from pixelprune.prompter import Messages, Prompter
from pixelprune.records.image_part import SESSION_KEY
from pixelprune.records.images import Root, read_image
from pixelprune.records.keys import KeyRules
from pixelprune.records.objects import PLAIN_STYLE, ObjectStyle
from pixelprune.records.prepare import hash_content, with_objects_written
from pixelprune.records.reader import parse_record
from pixelprune.records.record import ImageRef, Record, RecordError
from pixelprune.settings import PruneSettings
from training.data.files.remote import RemoteFolder
from training.data.settings import SourceSettings
from training.data.sources import open_sources
from training.errors import UserError
from training.evaluation.depth_pruning import encode_pruned_after
from training.evaluation.scoring import Prediction, failed, judge
from training.evaluation.targets import Target, TargetError, target_of


@dataclass(frozen=True)
class Task:
    """One record to be answered.

    root: the folder its image paths are relative to. fingerprint: changes with the record's text, its target or one of
    its images (of an image file, path, size and time of change count, so that nothing is read for it).
    """

    id: str
    record: Record
    target: Target
    root: Path | RemoteFolder | None
    fingerprint: str


@dataclass(frozen=True)
class AnswerSettings:
    """How answers are made and read. answer_format: see `pixelprune.answers`.

    template_kwargs: for the chat template. Models whose template reasons are trained on answers without reasoning;
    templates ignore names they do not know.
    """

    max_new_tokens: int = 128
    answer_format: str = "auto"
    batch_size: int = 8
    template_kwargs: Mapping[str, Any] = field(default_factory=lambda: {"enable_thinking": False})
    depth: int | None = None
    """Drop the omitted blocks behind this layer of the vision tower (`training.evaluation.depth_pruning`)."""


def read_tasks(
    sources: Sequence[SourceSettings],
    *,
    ignore_keys: Sequence[str] = (),
    index_dir: str = "",
    object_style: ObjectStyle = PLAIN_STYLE,
) -> tuple[list[Task], dict[str, str]]:
    """Records with a target, in the order of the files, and id -> reason of those that cannot be evaluated.

    ignore_keys, index_dir: as those of `data`. object_style: how a record's `objects` are written. Raises UserError
    when a source cannot be opened.
    """
    tasks, refused = [], {}
    try:
        rules = KeyRules.ignoring(ignore_keys)
        opened = open_sources(list(sources), index_dir)
    except ValueError as error:
        raise UserError(str(error)) from error
    for source in opened:
        for row in range(len(source)):
            record_id = source.record_id(row)
            try:
                record = parse_record(source.rows[row], source.settings.format, rules)
                record = source.settings.preset().apply(with_objects_written(record, source.root, object_style))
                num_question_turns(record)
                target = target_of(record)
                tasks.append(Task(record_id, record, target, source.root, _fingerprint(record, target, source.root)))
            except (RecordError, TargetError) as error:
                refused[record_id] = str(error)
    return tasks, refused


def predict(
    model: Any, prompter: Prompter, tasks: Sequence[Task], settings: AnswerSettings
) -> Iterator[list[Prediction]]:
    """One prediction per task, a batch at a time. The model is in eval mode.

    A record that cannot be prepared or generated is a failed prediction of its own; the others of its batch are
    generated without it.
    """
    for start in range(0, len(tasks), settings.batch_size):
        batch = tasks[start : start + settings.batch_size]
        done: dict[str, Prediction] = {}
        ready: list[tuple[Task, PrunedInputs]] = []
        for task in batch:
            try:
                ready.append((task, prepare_task(task, prompter, settings.template_kwargs)))
            except ValueError as error:  # images that cannot be read, records whose size is not the image's
                done[task.id] = failed(task.id, task.target, str(error))
        for prediction in _answer(model, prompter, ready, settings):
            done[prediction.id] = prediction
        yield [replace(done[task.id], fingerprint=task.fingerprint) for task in batch]


def prepare_task(task: Task, prompter: Prompter, template_kwargs: Mapping[str, Any]) -> PrunedInputs:
    """The pruned prompt of a record: its turns before the last answer, through the chat template.

    Raises ValueError for a record whose images cannot be used or have another size than `metadata.image_size`.
    """
    inputs = prepare(
        prompter,
        question_of(task.record, task.root),
        tools=list(task.record.tools) or None,
        template_kwargs=dict(template_kwargs),
    )
    images = inputs.samples[0].images
    if not images:
        if task.target.scorer == "place":
            raise ValueError("the record has no image")
        return inputs
    stated, (height, width) = task.target.image_size, images[-1].original_size
    if stated not in (None, (width, height)):
        raise ValueError(f"metadata.image_size is {stated[0]}x{stated[1]}, the image {width}x{height}")
    return inputs


def _answer(
    model: Any, prompter: Prompter, ready: list[tuple[Task, PrunedInputs]], settings: AnswerSettings
) -> list[Prediction]:
    """Generate for prepared records together; where that fails, each alone, so that one cannot fail the others."""
    if not ready:
        return []
    samples = [sample for _, inputs in ready for sample in inputs.samples]
    inputs = PrunedInputs(samples, [text for _, one in ready for text in one.texts], prompter)
    clock, failure = _FirstTokenClock(), ""
    try:
        answers = generate(
            model,
            inputs,
            max_new_tokens=settings.max_new_tokens,
            do_sample=False,
            features=_features(model, prompter, ready, inputs, settings),
            stopping_criteria=StoppingCriteriaList([clock]),
        )
    except (RuntimeError, ValueError, IndexError) as error:  # torch.OutOfMemoryError is a RuntimeError
        failure = f"{type(error).__name__}: {error}"[:2000]
    # Behind the except block: inside it, the error's traceback would keep the failed batch's memory.
    if failure and len(ready) > 1:
        return [one for entry in ready for one in _answer(model, prompter, [entry], settings)]
    if failure:
        task, own = ready[0]
        return [failed(task.id, task.target, failure, **_blocks(own))]
    predictions = []
    costs, num_layers = CostModel.from_config(model.config), model.config.vision_config.depth
    for (task, own), text, ids in zip(ready, answers.texts, answers.token_ids, strict=True):
        images = own.samples[0].images
        size = images[-1].original_size[::-1] if images else None
        facts = _blocks(own) | {"num_generated": len(ids), "first_token_s": clock.seconds}
        facts["prefill_flops"] = _flops(costs, own, settings, num_layers)
        facts["prefill_flops_square"] = _flops(costs.whole_square(), own, settings, num_layers)
        predictions.append(judge(task.id, task.target, text, size, settings.answer_format, **facts))
    return predictions


def _features(
    model: Any,
    prompter: Prompter,
    ready: list[tuple[Task, PrunedInputs]],
    inputs: PrunedInputs,
    settings: AnswerSettings,
) -> dict[str, Any] | None:
    """None where images are pruned before the tower, which `generate` then runs itself."""
    if settings.depth is None:
        return None
    full = replace(prompter, prune=PruneSettings("none"))
    whole = [prepare_task(task, full, settings.template_kwargs) for task, _ in ready]
    samples, texts = [one.samples[0] for one in whole], [one.texts[0] for one in whole]
    return encode_pruned_after(model, settings.depth, inputs, PrunedInputs(samples, texts, full))


class _FirstTokenClock(StoppingCriteria):
    """Never stops; notes when `generate` first asks, which is after the first token."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self.seconds: float | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
        if self.seconds is None:
            if input_ids.is_cuda:
                torch.cuda.synchronize(input_ids.device)
            self.seconds = time.perf_counter() - self._started
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _blocks(inputs: PrunedInputs) -> dict[str, int]:
    return {"kept_blocks": inputs.num_kept_blocks, "full_blocks": inputs.num_blocks}


def _flops(costs: CostModel, inputs: PrunedInputs, settings: AnswerSettings, num_layers: int) -> float:
    """Of one prompt up to its first token, with the blocks dropped where they are."""
    sample = inputs.samples[0]
    kept = [image.selection.num_kept for image in sample.images]
    share = 0.0 if settings.depth is None else (settings.depth + 1) / num_layers
    return costs.prefill_flops(
        kept_blocks=kept,
        text_tokens=len(sample) - sum(kept),
        full_blocks=[image.selection.keep.size for image in sample.images],
        tower_share=share,
    )


def _fingerprint(record: Record, target: Target, root: Path | RemoteFolder | None) -> str:
    sources = (image.source for image in record.images)
    images = [_describe_file(source, root) if isinstance(source, str) else source for source in sources]
    return f"{hash_content(record, images):016x}{xxhash.xxh3_64(repr(target).encode()).hexdigest()}"


def _describe_file(name: str, root: Path | RemoteFolder | None) -> bytes:
    if isinstance(root, RemoteFolder):
        return root.describe(name).encode(errors="replace")
    try:
        stat = ((root or Path()) / name).stat()
    except (OSError, ValueError):  # answering the record will say what is wrong
        return name.encode(errors="replace")
    return f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}".encode(errors="replace")


def num_question_turns(record: Record) -> int:
    """Number of turns before the last answer. Raises TargetError when they do not end with the user."""
    turns = len(record.messages)
    if turns and record.messages[-1].role == "assistant":
        turns -= 1
    if not turns or record.messages[turns - 1].role not in ("user", "tool"):
        raise TargetError("expected a user's or a tool's turn to be answered")
    return turns


def question_of(record: Record, root: Root | None) -> Messages:
    """The turns before the last answer as `pixelprune.hf.prepare` takes them, with the bytes of their images."""
    messages: Messages = []
    for message in record.messages[: num_question_turns(record)]:
        content: list[dict[str, Any]] = []
        for part in message.parts:
            if isinstance(part, str):
                content.append({"type": "text", "text": part})
            elif isinstance(part, ImageRef):
                session = {SESSION_KEY: True} if part.starts_session else {}
                content.append({"type": "image", "image": read_image(part, root), **part.wish.stated, **session})
        messages.append({"role": message.role, "content": content, **message.template_fields})
    return messages
