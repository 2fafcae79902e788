"""A batch of prompts -> answers with the hidden states behind every token, out of one stock generation.

B = prompts, T = tokens of the longest answer, D = model width
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from torch import nn

from pixelprune.decoding import end_token_ids
from pixelprune.hf import PrunedInputs, generate
from training.answers.written import Answer
from training.config.ranges import POSITIVE, SHARE, at_least, check_fields
from training.loss.divergence import tempered_log_softmax

CHUNK = 1024
"""Tokens whose logits exist at one time."""


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn. num_samples: answers to every prompt. temperature: 0 takes the most probable token each
    time (greedy). top_k, top_p: only the k most probable tokens (0: all), or the fewest that reach this probability."""

    max_new_tokens: int = 256
    num_samples: int = 1
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(
            self,
            max_new_tokens=at_least(1),
            num_samples=at_least(1),
            temperature=at_least(0),
            top_k=at_least(0),
            top_p=SHARE if self.top_p > 0 else POSITIVE,
            seed=at_least(0),
        )
        if self.num_samples > 1 and self.temperature == 0:
            raise ValueError(f"num_samples: {self.num_samples} greedy answers are all the same; give a temperature")

    def arguments(self) -> dict[str, Any]:
        """Those of the stock `generate`. What a model's generation config would change of its distribution is off."""
        drawn = {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p} if self.temperature else {}
        return {
            "max_new_tokens": self.max_new_tokens,
            "do_sample": self.temperature > 0,
            "num_return_sequences": self.num_samples,
            "repetition_penalty": 1.0,
            "no_repeat_ngram_size": 0,
            **drawn,
        }


@torch.no_grad()
def answer(model: Any, inputs: PrunedInputs, sampling: Sampling, *place: int) -> list[Answer]:
    """Answers of a model in eval mode to all prompts, `num_samples` behind each other for each.

    place: what the seed of these draws is made of beside `sampling.seed`, such as the number of the batch: the same
    prompts in the same batch get the same answers, whatever was drawn before.
    """
    head = model.get_output_embeddings()
    with seeded(model.device, sampling.seed, *place), _watched(head) as steps:
        found = generate(model, inputs, **sampling.arguments())
    hidden = torch.stack(steps, dim=1)  # (B, T, D)
    num_columns = found.output.sequences.shape[1] - _prompt_len(inputs)
    assert hidden.shape[:2] == (len(found.token_ids), num_columns), "one hidden state for every token"
    ends = end_token_ids(model, {})
    return [
        _answer(tuple(ids), text, own[: len(ids)], head, ends)
        for ids, text, own in zip(found.token_ids, found.texts, hidden, strict=True)
    ]


def log_probs_of(ids: torch.Tensor, hidden: torch.Tensor, head: nn.Module) -> torch.Tensor:
    """float32 (n,): log-probability of each id under the logits of its hidden state (n, D)."""
    parts = [
        tempered_log_softmax(head(rows), 1.0).gather(-1, wanted[:, None])[:, 0]
        for rows, wanted in zip(hidden.split(CHUNK), ids.split(CHUNK), strict=True)
    ]
    return torch.cat(parts).float()


def _answer(ids: tuple[int, ...], text: str, hidden: torch.Tensor, head: nn.Module, ends: set[int]) -> Answer:
    log_probs = log_probs_of(torch.tensor(ids, device=hidden.device), hidden, head)
    return Answer(ids, text, ids[-1] in ends, log_probs.cpu(), hidden.cpu())


@contextmanager
def _watched(head: nn.Module) -> Iterator[list[torch.Tensor]]:
    """What goes into the output head, (B, D) for every token: the states that a teacher's pass would give."""
    steps: list[torch.Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, inputs: steps.append(inputs[0][:, -1].clone()))
    try:
        yield steps
    finally:
        hook.remove()


@contextmanager
def seeded(device: torch.device, *numbers: int) -> Iterator[None]:
    """Draws from a stream of their own; whatever else draws numbers goes on as if nothing had been drawn."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(xxhash.xxh3_64(repr(numbers).encode()).intdigest() >> 1)
        yield


def _prompt_len(inputs: PrunedInputs) -> int:
    return max(len(sample) for sample in inputs.samples)
