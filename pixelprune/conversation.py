"""A conversation over several turns that computes only what is new: earlier turns stay in the key-value cache."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from pixelprune.decoding import decode, end_token_ids, generation_settings
from pixelprune.hf import Generation, encode_images
from pixelprune.images.image import PrunedImage
from pixelprune.prompter import Messages, Prompter, shots_of
from pixelprune.records.record import ImageRef
from pixelprune.sample import ChatTokens, Sample, build_sample
from pixelprune.sessions.pruning import continue_session, is_in_time
from pixelprune.sessions.rule import Coded
from pixelprune.settings import PruneSettings, ResizeSettings

__all__ = ["EMPTY", "Conversation"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Row:
    """The tokens of the conversation so far, answers included.

    input_ids int64 (L,), position_ids int64 (3, L): MRoPE of the unpruned sequence; next_position follows them;
    text: what the tokens stand for, as the chat template renders it. last: the last image, for the next to be predicted
    from; None where the strategy looks at each by itself.
    """

    input_ids: np.ndarray
    position_ids: np.ndarray
    next_position: int
    text: str
    images: tuple[PrunedImage, ...]
    last: Coded | None = None

    def extended(self, sample: Sample, text: str) -> _Row:
        """With the tokens and images of a sample that starts at `next_position`."""
        return _Row(
            np.concatenate([self.input_ids, sample.input_ids]),
            np.concatenate([self.position_ids, sample.position_ids], axis=1),
            sample.next_position,
            self.text + text,
            (*self.images, *sample.images),
            self.last,
        )


EMPTY = _Row(np.empty(0, dtype=np.int64), np.empty((3, 0), dtype=np.int64), 0, "", ())


class Conversation:
    """Turns with one stock model. `ask` adds a user turn, with or without new images, and returns the answer.

    Only the new turn's tokens and images are computed. Where that cannot give what a fresh prefill of the whole
    conversation gives (the chat template rewrites earlier answers, as reasoning templates do; a turn that failed; a new
    screenshot with `prune.direction=backward`, after which other blocks of earlier ones are kept), the turn is computed
    from the start, and a line in the log says so.

    messages: the conversation so far, answers included, in Hugging Face form.
    num_cached_tokens: tokens whose keys and values are at hand for the next turn.
    """

    def __init__(
        self,
        model: Any,
        source: Any,
        *,
        prune: PruneSettings | str | None = None,
        resize: ResizeSettings | None = None,
        tools: list[Any] | None = None,
        template_kwargs: dict[str, Any] | None = None,
        trust_remote_code: bool = False,
    ):
        """source, prune, resize, trust_remote_code: as for `pixelprune.hf.prepare`, but a `prune.direction` of auto is
        forward: a conversation grows.
        """
        self.model = model
        if not isinstance(source, Prompter):
            source = Prompter.load(source, prune=prune, resize=resize, trust_remote_code=trust_remote_code)
        self.prompter = replace(source, prune=source.prune.resolved(last_turn_only=False))
        self.tools = tools
        self.template_kwargs = template_kwargs
        self.messages: Messages = []
        self._row = EMPTY
        self._cache: Any = None

    @property
    def num_tokens(self) -> int:
        """Tokens of the conversation after pruning, answers included."""
        return len(self._row.input_ids)

    @property
    def num_cached_tokens(self) -> int:
        return 0 if self._cache is None else self._cache.get_seq_length()

    @property
    def images(self) -> tuple[PrunedImage, ...]:
        """The images of all turns, as the model is given them."""
        return self._row.images

    @property
    def retain_ratio(self) -> float:
        """Kept blocks / all blocks over the images of all turns; 1.0 without images."""
        num_blocks = sum(image.num_full_blocks for image in self._row.images)
        return sum(image.selection.num_kept for image in self._row.images) / num_blocks if num_blocks else 1.0

    @torch.no_grad()
    def ask(
        self,
        content: str | list[Any] | dict[str, Any],
        *,
        role: str = "user",
        max_new_tokens: int | None = None,
        **generate_kwargs: Any,
    ) -> Generation:
        """Add a turn and generate the answer.

        content: text; a list of text and image parts; a message; or a list of messages (a system and a user turn, tool
        results). Further arguments are those of the stock `generate`, for one sequence without beams.
        A turn that fails leaves the conversation as it was. Raises ValueError as `prepare` and `generate` do.
        """
        self._refuse_unusable(generate_kwargs)
        suppressed = self._suppressed(generate_kwargs)
        settings = generation_settings(
            self.model, self.prompter, max_new_tokens, generate_kwargs, suppress_tokens=suppressed
        )
        messages = [*self.messages, *_as_messages(content, role)]
        row, new_from = self._append_turn(messages)
        cache, self._cache = self._cache if new_from else None, None  # generation changes it, so a failure loses it
        cache = self._prefill(row, new_from, cache)
        device = self.model.get_input_embeddings().weight.device
        input_ids = torch.from_numpy(row.input_ids)[None].to(device)
        output = self.model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            position_ids=torch.from_numpy(_with_row_positions(row.position_ids, 0))[:, None].to(device),
            past_key_values=cache,
            **settings,
        )
        output.past_key_values = None
        answer = output.sequences[0, len(row.input_ids) :].tolist()
        text = decode(self.prompter, [answer])[0]
        self._keep(row, answer, text, messages, cache, end_token_ids(self.model, generate_kwargs))
        return Generation([text], [answer], output)

    def _append_turn(self, messages: Messages) -> tuple[_Row, int]:
        """The row with the new turn, and the number of its leading tokens that the cache holds."""
        text, sources = self.prompter.render(messages, tools=self.tools, template_kwargs=self.template_kwargs)
        images, last, have_changed = self._pruned(sources)
        num_cached = self.num_cached_tokens
        tail = None if have_changed else self._tail(text)
        if tail is None:
            if self.messages:
                backward = "prune.direction=backward, and a new image changes what is kept of earlier ones"
                why = backward if have_changed else "the chat template rewrites earlier turns"
                logger.info("%s: this turn is computed from the start", why)
            row, tail, text, num_cached = EMPTY, self.prompter.tokens(text), text, 0
        else:
            row, text = self._row, text[len(self._row.text) :]
            images = images[len(row.images) :]
        sample = build_sample(
            tail,
            images,
            image_token_id=self.prompter.image_token_id,
            first_position=row.next_position,
            record_id=f"turn {len(messages)}",
        )
        return replace(row.extended(sample, text), last=last), num_cached

    def _pruned(self, sources: list[ImageRef]) -> tuple[list[PrunedImage], Coded | None, bool]:
        """All images of the conversation, the last of them coded, and whether other blocks of earlier ones are kept.

        An image keeps its blocks, except backward, where later images decide what is kept of earlier ones.
        """
        earlier, prune = self._row.images, self.prompter.prune
        if prune.direction == "backward" and is_in_time(prune):
            images = self.prompter.prune_images(sources)
            keeps = [(old.selection.keep, new.selection.keep) for old, new in zip(earlier, images, strict=False)]
            return images, None, not all(np.array_equal(old, new) for old, new in keeps)
        added, last = continue_session(
            shots_of(sources[len(earlier) :]),
            prune,
            self.prompter.resize,
            num_before=len(earlier),
            before=self._row.last,
        )
        return [*earlier, *added], last, False

    def _tail(self, text: str) -> ChatTokens | None:
        """Tokens of what follows the row in the rendered conversation; None when the row is not how it begins.

        Tokens behind a cut are those of the whole text only when the cut is in front of a special token.
        """
        if not self._row.text or not text.startswith(self._row.text):
            return None
        tail = self.prompter.tokens(text[len(self._row.text) :])
        added = self.prompter.tokenizer.added_tokens_decoder
        is_special = len(tail.input_ids) and added.get(int(tail.input_ids[0]))
        return tail if is_special and is_special.special else None

    def _prefill(self, row: _Row, start: int, cache: Any) -> Any:
        """Keys and values of the row's tokens from `start` to the last but one, which `generate` begins with."""
        from transformers import DynamicCache

        cache = cache if cache is not None else DynamicCache(config=self.model.config)
        stop = len(row.input_ids) - 1
        ids = row.input_ids[start:stop]
        device = self.model.get_input_embeddings().weight.device
        images = list(row.images[self._num_images_before(row, start) :])
        new = Sample(ids, row.position_ids[:, start:stop], np.zeros(len(ids), bool), images, row.next_position - 1)
        if row.input_ids[-1] == self.prompter.image_token_id:
            raise ValueError("the prompt ends in an image; expected text behind it (the chat template's answer header)")
        self.model(
            input_ids=torch.from_numpy(ids)[None].to(device),
            position_ids=torch.from_numpy(_with_row_positions(new.position_ids, start))[:, None].to(device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            **encode_images(self.model, [new], self.prompter),
        )
        return cache

    def _num_images_before(self, row: _Row, start: int) -> int:
        """Images whose placeholders lie in front of `start`; the cache never ends within an image."""
        before = int((row.input_ids[:start] == self.prompter.image_token_id).sum())
        kept = np.cumsum([0, *(image.selection.num_kept for image in row.images)]).tolist()
        assert before in kept, f"{before} image tokens are cached, images end at {kept}"
        return int(kept.index(before))

    def _keep(self, row: _Row, answer: list[int], text: str, messages: Messages, cache: Any, ends: set[int]) -> None:
        """The conversation with the answer. The end token is left out: the template writes it (it is not cached)."""
        spoken = np.array(answer[:-1] if answer and answer[-1] in ends else answer, dtype=np.int64)
        positions = np.broadcast_to(row.next_position + np.arange(len(spoken)), (3, len(spoken)))
        sample = Sample(spoken, positions, np.zeros(len(spoken), bool), [], row.next_position + len(spoken))
        self._row = row.extended(sample, text)
        self.messages = [*messages, {"role": "assistant", "content": text}]
        expected = len(row.input_ids) + len(answer) - 1
        self._cache = cache if cache.get_seq_length() == expected else None
        if self._cache is None:
            logger.info("the cache holds other tokens than the answer: the next turn is computed from the start")

    def _suppressed(self, generate_kwargs: dict[str, Any]) -> list[int]:
        """An answer must not hold image placeholders: the next turn would take them for images."""
        config = generate_kwargs.get("generation_config") or self.model.generation_config
        wanted = generate_kwargs.get("suppress_tokens", config.suppress_tokens)
        return sorted({*(wanted or []), self.prompter.image_token_id})

    def _refuse_unusable(self, generate_kwargs: dict[str, Any]) -> None:
        config = generate_kwargs.get("generation_config") or self.model.generation_config
        for name in ("num_beams", "num_return_sequences"):
            value = generate_kwargs.get(name) or getattr(config, name, None) or 1
            if value != 1:
                raise ValueError(f"{name}={value}: a conversation continues one sequence; use pixelprune.hf.generate")
        if generate_kwargs.get("use_cache") is False:
            raise ValueError("use_cache=False: a conversation lives in its cache; use pixelprune.hf.generate")


def _with_row_positions(mrope: np.ndarray, start: int) -> np.ndarray:
    """MRoPE (3, n) with the row of token counts on top: (4, n)."""
    return np.concatenate([np.arange(start, start + mrope.shape[1])[None], mrope])


def _as_messages(content: str | list[Any] | dict[str, Any], role: str) -> Messages:
    if isinstance(content, dict) and "role" in content:
        return [content]
    if isinstance(content, list) and content and all(isinstance(part, dict) and "role" in part for part in content):
        return content
    return [{"role": role, "content": content}]
