"""The model that lmms-eval asks: its messages through `prepare`, its answers through `generate`, greedily.

lmms_eval --model pixelprune --model_args pretrained=FOLDER,strategy=pred2d --tasks docvqa_val,chartqa --batch_size 8
"""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.model import lmms
from loguru import logger

from pixelprune.hf import PrunedInputs, generate, prepare
from pixelprune.lmms.answer_log import AnswerLog, LoggedAnswer
from pixelprune.prompter import Messages, Prompter

DEFAULT_TOKENS = 128
"""New tokens where a task names no limit, as lmms-eval's own chat models take it."""
_GREEDY = {"temperature": (0, None), "do_sample": (False, None), "num_beams": (1, None)}
_WITHOUT_MEANING = ("until", "top_p", "top_k")
"""Left out: stop texts, as lmms-eval's own chat models of this family do, and what only sampling reads."""
_ELSEWHERE = "screenspot"


class PixelPruneModel(lmms):
    """A stock model on pruned images. Retain ratios are in the answer log, since lmms-eval takes texts alone."""

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        strategy: str | None = None,
        metric: str | None = None,
        threshold: float | None = None,
        seed: int | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        dtype: str = "auto",
        attn_implementation: str | None = None,
        answers: str = "lmms_answers",
        batch_size: int | str = 1,
        max_batch_size: int | str | None = None,
        device: str | None = None,
    ) -> None:
        """Arguments of --model_args, but for the last three, which lmms-eval adds.

        pretrained: a model folder or hub id. strategy, metric, threshold, seed, min_pixels, max_pixels: instead of what
        the model was trained with (its pixelprune.json) or published with; strategy=none asks with all blocks.
        answers: folder of the answer log. Raises ValueError for settings that cannot be used.
        """
        super().__init__()
        from transformers import AutoModelForImageTextToText

        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self._device = torch.device(device) if device and self._world_size == 1 else self.accelerator.device
        prompter = Prompter.load(pretrained)
        given = {"strategy": strategy, "metric": metric, "threshold": threshold, "seed": seed}
        limits = {"min_pixels": min_pixels, "max_pixels": max_pixels}
        self.prompter = Prompter.load(
            pretrained,
            prune=dataclasses.replace(prompter.prune, **_named(given)),
            resize=dataclasses.replace(prompter.resize, **_named(limits)),
        )
        loading = _named({"attn_implementation": attn_implementation})
        model = AutoModelForImageTextToText.from_pretrained(pretrained, dtype=dtype, **loading)
        self.model = model.to(self._device).eval()
        self.batch_size = int(batch_size)
        self.log = AnswerLog(Path(answers), self._rank, self._settings(pretrained))

    @property
    def device(self) -> torch.device:
        """Where lmms-eval makes the tensors that ranks exchange."""
        return self._device

    def _settings(self, pretrained: str) -> str:
        """What answers depend on beside the prompts: the weights, by name, size and time of their files."""
        files = sorted(Path(pretrained).glob("*.safetensors"))
        weights = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        commit = getattr(self.model.config, "_commit_hash", None)
        return json.dumps([pretrained, commit, weights, str(self.model.dtype)])

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers in the order of the requests; each batch is in the log when it is done.

        Raises ValueError for tasks that are scored wrongly there, for generation settings other than greedy, and for
        processes that do not know of each other.
        """
        if self.world_size > self.accelerator.num_processes:  # lmms-eval tells us its own count by now
            raise ValueError(
                f"lmms-eval has {self.world_size} processes and accelerate knows of {self.accelerator.num_processes}: "
                "their answers would not be brought together; on CPUs, set ACCELERATE_USE_CPU=true"
            )
        texts: list[str] = []
        kept: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        for same in _runs_of_same_settings(requests):
            for start in range(0, len(same), self.batch_size):
                for task, answer in self._answer(same[start : start + self.batch_size]):
                    texts.append(answer.text)
                    kept[task][0] += answer.kept_blocks
                    kept[task][1] += answer.full_blocks
        for task, (num_kept, num_all) in kept.items():
            if num_all:
                logger.info(f"{task}: {num_kept} of {num_all} blocks kept on this rank, {num_kept / num_all:.1%}")
        return texts

    def _answer(self, requests: Sequence[Any]) -> list[tuple[str, LoggedAnswer]]:
        max_new_tokens = max_new_tokens_of(requests[0].args[2])
        found: list[LoggedAnswer | None] = []
        inputs: list[PrunedInputs] = []
        for request in requests:
            _, doc_to_messages, _, doc_id, task, split = request.args
            if task.startswith(_ELSEWHERE):
                raise ValueError(
                    f"{task}: lmms-eval reads answers from 0 to 1000 as pixels, so that right ones count as wrong; "
                    "convert it with `python -m data_tools screenspot` and ask with `python -m training.evaluate`"
                )
            one = prepare(self.prompter, messages_of(doc_to_messages(self.task_dict[task][split][doc_id])))
            inputs.append(one)
            found.append(self.log.get(self.log.key(one.samples[0], max_new_tokens)))
        pending = [number for number, answer in enumerate(found) if answer is None]
        if pending:
            samples = [inputs[number].samples[0] for number in pending]
            prompts = [inputs[number].texts[0] for number in pending]
            batch = PrunedInputs(samples, prompts, self.prompter)
            made = generate(self.model, batch, max_new_tokens=max_new_tokens, do_sample=False)
            for number, text, ids in zip(pending, made.texts, made.token_ids, strict=True):
                one, (_, _, _, doc_id, task, _) = inputs[number], requests[number].args
                key = self.log.key(one.samples[0], max_new_tokens)
                counts = one.num_kept_blocks, one.num_blocks, len(ids)
                found[number] = LoggedAnswer(key, task, str(doc_id), text, *counts)
            self.log.add(answer for number in pending if (answer := found[number]) is not None)
        return [
            (request.args[4], answer) for request, answer in zip(requests, found, strict=True) if answer is not None
        ]

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Not offered: the paper's benchmarks are answered in words."""
        raise NotImplementedError("pixelprune answers tasks of output_type generate_until, not loglikelihood")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not offered."""
        raise NotImplementedError("pixelprune answers tasks of output_type generate_until, in one round")


def _named(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _runs_of_same_settings(requests: Sequence[Any]) -> list[list[Any]]:
    """Neighbours that may be generated together, in order."""
    runs: list[list[Any]] = []
    for request in requests:
        if runs and runs[-1][-1].args[2] == request.args[2]:
            runs[-1].append(request)
        else:
            runs.append([request])
    return runs


def max_new_tokens_of(generation: dict[str, Any]) -> int:
    """New tokens that a task allows. Raises ValueError for what would not be greedy, or is not known."""
    for name, value in generation.items():
        if name == "max_new_tokens" or name in _WITHOUT_MEANING:
            continue
        if value not in _GREEDY.get(name, ()):
            raise ValueError(f"the task's generation_kwargs ask for {name}={value!r}: pixelprune answers greedily")
    return int(generation.get("max_new_tokens") or DEFAULT_TOKENS)


def messages_of(messages: Sequence[dict[str, Any]]) -> Messages:
    """lmms-eval's messages as `prepare` takes them. Raises ValueError for sound and video."""
    found: Messages = []
    for message in messages:
        parts = []
        for part in message["content"]:
            if part["type"] == "text":
                parts.append({"type": "text", "text": part["text"]})
            elif part["type"] == "image":
                parts.append({"type": "image", "image": part["url"]})
            else:
                raise ValueError(f"a message holds {part['type']}: pixelprune takes texts and images")
        found.append({"role": message["role"], "content": parts})
    return found
