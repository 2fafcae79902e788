"""A model answers prompts: on all ranks, part by part, with what its teacher's targets are kept in the same pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console

from pixelprune.command import ProgressLine
from pixelprune.hf import PrunedInputs, prepare
from pixelprune.images.image import ImageError
from pixelprune.images.image_file import MAX_FILE_BYTES
from pixelprune.prompter import Prompter
from pixelprune.records.chat import ChatEncoder
from pixelprune.records.images import read_image
from pixelprune.records.keys import KeyRules
from pixelprune.records.objects import PLAIN_STYLE, ObjectStyle
from pixelprune.records.prepare import hash_content, with_objects_written
from pixelprune.records.reader import parse_record
from pixelprune.records.record import Message, Record, RecordError
from training.answers.answer_files import AnswerFiles
from training.answers.generating import Sampling, answer
from training.answers.written import Answer, answered, row_of
from training.data.sources import Source
from training.data.targets import TargetEntry, write_shard
from training.distributed.ranks import PATIENCE_MINUTES, Ranks
from training.errors import RankError
from training.evaluation.answering import num_question_turns, question_of
from training.evaluation.targets import TargetError
from training.loop.teacher_cache import stored_values

Labelled = Literal["keep", "skip", "answer"]
"""What becomes of a record that ends with an answer: it is kept as it is, left out, or answered anew."""


@dataclass(frozen=True)
class PassSettings:
    """batch_size: prompts generated together. part_size: prompts of a part, which a killed rank does again at most.

    enable_thinking: how the chat template asks; None for its default. by_confidence: tokens weigh their probability.
    """

    sampling: Sampling
    labelled: Labelled = "keep"
    batch_size: int = 8
    part_size: int = 256
    enable_thinking: bool | None = False
    by_confidence: bool = False
    style: ObjectStyle = PLAIN_STYLE
    rules: KeyRules = dataclasses.field(default_factory=KeyRules)
    limit: int = 0
    """Only the first n prompts; 0 takes all."""


@dataclass(frozen=True)
class TargetStore:
    """Where the answers' teacher targets go: the folder of a recipe's cache, and the recipe."""

    folder: Path
    config: Any


@dataclass(frozen=True)
class _Asked:
    """A prompt that is ready: the record as it is asked, and its turns as the model reads them."""

    source: Source
    id: str
    record: Record
    inputs: PrunedInputs


class AnswerPass:
    """All prompts of the sources, one behind the other, in parts of `part_size`."""

    def __init__(self, model: Any, prompter: Prompter, sources: Sequence[Source], settings: PassSettings):
        """prompter: of the model, with pruning "none" where it answers as a teacher."""
        self.model, self.prompter, self.sources, self.settings = model, prompter, list(sources), settings
        self.encoder = ChatEncoder(prompter.tokenizer, grounding_tokens=prompter.grounding_tokens)
        self.starts = np.concatenate([[0], np.cumsum([len(source) for source in sources])])

    @property
    def num_prompts(self) -> int:
        return min(int(self.starts[-1]), self.settings.limit or int(self.starts[-1]))

    @property
    def num_parts(self) -> int:
        return -(-self.num_prompts // self.settings.part_size)

    def run(self, files: AnswerFiles, store: TargetStore | None, ranks: Ranks, console: Console) -> None:
        """Answer what has no part yet, this rank's share of it."""
        missing = ranks.from_first(files.missing)
        mine = missing[ranks.rank :: ranks.world_size]
        if len(missing) < self.num_parts and ranks.is_first:
            console.print(f"{files.folder}: continuing, {self.num_parts - len(missing)} of {self.num_parts} parts")
        num_mine = sum(len(self._rows(part)) for part in mine)
        what = "prompts, on this rank" if ranks.world_size > 1 else "prompts"
        with ProgressLine(what, num_mine, is_shown=ranks.is_first, console=console) as line:
            for part in mine:
                lines, entries = list[dict[str, Any]](), list[TargetEntry]()
                for batch_lines, batch_entries, num in self._batches(part, store):
                    lines += batch_lines
                    entries += batch_entries
                    line.advance(num)
                if store is not None and entries:
                    # Before the part: what a kill leaves between the two is written again, under the same name.
                    write_shard(store.folder, entries)
                files.write(part, lines)
        ranks.barrier(PATIENCE_MINUTES)

    def _rows(self, part: int) -> range:
        size = self.settings.part_size
        return range(part * size, min((part + 1) * size, self.num_prompts))

    def _batches(
        self, part: int, store: TargetStore | None
    ) -> Iterator[tuple[list[dict[str, Any]], list[TargetEntry], int]]:
        """Lines, targets and number of prompts, batch by batch. A batch is the same whatever was answered before."""
        rows, size = self._rows(part), self.settings.batch_size
        for start in range(0, len(rows), size):
            batch = rows[start : start + size]
            lines: dict[int, list[dict[str, Any]]] = {row: [] for row in batch}
            ready: list[tuple[int, _Asked]] = []
            for row in batch:
                asked = self._asked(row)
                if isinstance(asked, _Asked):
                    ready.append((row, asked))
                elif asked is not None:
                    lines[row].append(asked)
            entries = []
            for row, line, entry in self._answered(ready, store, batch[0]):
                lines[row].append(line)
                entries += [entry] if entry else []
            yield [line for row in batch for line in lines[row]], entries, len(batch)

    def _asked(self, row: int) -> _Asked | dict[str, Any] | None:
        """The prompt of a row; else the line that stands for it, None where it is to be left out."""
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        source, settings = self.sources[number], self.settings
        row_of_source = int(row - self.starts[number])
        name = source.record_id(row_of_source)
        try:
            record = parse_record(source.rows[row_of_source], source.settings.format, settings.rules)
            record = source.settings.preset().apply(with_objects_written(record, source.root, settings.style))
            if record.messages[-1].role == "assistant" and settings.labelled != "answer":
                kept = {"source": source.name, "is_new": False, "record": row_of(record)}
                return None if settings.labelled == "skip" else kept
            num_turns = num_question_turns(record)
            choice = {} if settings.enable_thinking is None else {"enable_thinking": settings.enable_thinking}
            tools = list(record.tools) or None
            inputs = prepare(self.prompter, question_of(record, source.root), tools=tools, template_kwargs=choice)
            return _Asked(source, name, dataclasses.replace(record, messages=record.messages[:num_turns]), inputs)
        except (RecordError, ImageError) as error:
            return _refused(name, error.reason, error)
        except TargetError as error:
            return _refused(name, "no_question", error)
        except ValueError as error:
            return _refused(name, "unusable", error)

    def _answered(
        self, ready: list[tuple[int, _Asked]], store: TargetStore | None, place: int
    ) -> Iterator[tuple[int, dict[str, Any], TargetEntry | None]]:
        if not ready:
            return
        samples = [sample for _, asked in ready for sample in asked.inputs.samples]
        texts = [text for _, asked in ready for text in asked.inputs.texts]
        sampling = self.settings.sampling
        try:
            found = answer(self.model, PrunedInputs(samples, texts, self.prompter), sampling, place)
        except torch.OutOfMemoryError as error:
            names = ", ".join(asked.id for _, asked in ready)
            raise RankError(f"out of memory with {len(samples)} prompts ({names}); lower --batch-size") from error
        for number, one in enumerate(found):
            row, asked = ready[number // sampling.num_samples]
            try:
                yield row, *self._line(asked, one, number % sampling.num_samples, store)
            except RecordError as error:
                yield row, _refused(asked.id, error.reason, error), None

    def _line(
        self, asked: _Asked, one: Answer, number: int, store: TargetStore | None
    ) -> tuple[dict[str, Any], TargetEntry | None]:
        """What is written of an answer. Raises RecordError unless it is read back as it was generated."""
        settings = self.settings
        tokens = one.tokens(enable_thinking=settings.enable_thinking, by_confidence=settings.by_confidence)
        messages: tuple[Message, ...] = answered(asked.record.messages, one, tokens)
        facts: dict[str, Any] = {"log_prob": round(float(one.log_probs.double().sum()), 6), "has_ended": one.has_ended}
        facts |= {"of": asked.id, "sample": number}
        row = row_of(dataclasses.replace(asked.record, messages=messages), answer=facts)
        read = parse_record(row, "messages", KeyRules())
        chat = self.encoder.encode(read)
        prompt = self.prompter.tokens(asked.inputs.texts[0]).input_ids
        if chat.input_ids.tolist() != [*prompt.tolist(), *one.ids]:
            raise RecordError(
                "prompt", "training would read this conversation as other tokens than the model was asked"
            )
        if self.prompter.image_token_id in one.ids:
            raise RecordError("image_token", "the answer holds the token that stands for an image")
        line = {"source": asked.source.name, "is_new": True, "record": row}
        if store is None:
            return line, None
        pictures = [read_image(ref, asked.source.root, MAX_FILE_BYTES) for ref in read.images]
        values = stored_values(one.hidden, self.model.get_output_embeddings(), store.config)
        labels = np.array(one.ids, dtype=np.int64)
        return line, TargetEntry(hash_content(read, pictures), labels, values)


def _refused(name: str, reason: str, error: Exception) -> dict[str, Any]:
    return {"id": name, "reason": reason, "detail": str(error)}
