"""Conversations in Hugging Face or OpenAI form -> rendered text, token ids and pruned images."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pixelprune.images.image import PrunedImage
from pixelprune.model_folder import PRUNE_FILE, ModelFolder, TrainedWith, read_model_file, read_prune_file, size_limits
from pixelprune.records.agents import strings_in
from pixelprune.records.chat import control_tokens, would_forge
from pixelprune.records.image_part import IMAGE_KEYS, image_of_part, read_keys
from pixelprune.records.keys import NO_RULES
from pixelprune.records.record import ImageRef, RecordError
from pixelprune.sample import ChatTokens
from pixelprune.sessions.pruning import Shot, prune_shots
from pixelprune.settings import PruneSettings, ResizeSettings

__all__ = [
    "IMAGE_TYPES",
    "TEXT_TYPES",
    "Prompter",
    "shots_of",
]

IMAGE_TYPES = ("image", "image_url", "input_image")
TEXT_TYPES = ("text", "input_text")

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Prompter:
    """What turns messages into a pruned prompt: tokenizer, chat template, image token, and the settings in force.

    image_mean, image_std: the pixel normalisation of the model's own image processor.
    """

    tokenizer: Any
    chat_template: str
    image_token_id: int
    prune: PruneSettings
    resize: ResizeSettings
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    grounding_tokens: bool = False
    """Texts may hold `pixelprune.answers.GROUNDING_TOKENS`, as those of a model trained with data.grounding_tokens."""

    @classmethod
    def load(
        cls,
        source: Any,
        *,
        prune: PruneSettings | str | None = None,
        resize: ResizeSettings | None = None,
        grounding_tokens: bool | None = None,
        trust_remote_code: bool = False,
    ) -> Prompter:
        """From a model folder, a hub id, or a processor (an object with `.tokenizer` and `.image_processor`).

        prune, resize: where left out, the settings the model was trained with (pixelprune.json beside its weights),
        otherwise pred2d and the size limits of its image processor. `prune` may be a strategy's name; "none" keeps
        every block.
        grounding_tokens: texts may hold the tokens around things and boxes; where left out, as the model was trained,
        otherwise not. trust_remote_code: run code that comes with a folder.
        Raises ValueError for a source that is neither, or that has no chat template or image token.
        """
        if isinstance(source, str | Path):
            folder = ModelFolder.open(source, trust_remote_code=trust_remote_code)
            parts = _parts(folder.tokenizer, None, folder.config.image_token_id, folder.preprocessor)
        elif hasattr(source, "tokenizer"):
            parts = _from_processor(source)
        else:
            raise ValueError(
                f"expected a model folder, a hub id or a processor with a tokenizer, got {type(source).__name__}"
            )
        trained: TrainedWith | None = parts.pop("trained_with")
        limits = size_limits(parts.pop("preprocessor"))
        if isinstance(prune, str):
            prune = PruneSettings(strategy=prune)
        if grounding_tokens is None:
            grounding_tokens = bool(trained and trained.grounding_tokens)
        return cls(
            **parts,
            prune=prune or (trained.prune if trained else PruneSettings()),
            resize=resize or (trained.resize if trained else ResizeSettings(**limits)),
            grounding_tokens=grounding_tokens,
        )

    @property
    def image_token(self) -> str:
        return str(self.tokenizer.convert_ids_to_tokens(self.image_token_id))

    @property
    def pad_token_id(self) -> int:
        pad: int | None = self.tokenizer.pad_token_id
        end: int = self.tokenizer.eos_token_id
        return pad if pad is not None else end

    def render(
        self, messages: Messages, *, tools: list[Any] | None = None, template_kwargs: dict[str, Any] | None = None
    ) -> tuple[str, list[ImageRef]]:
        """The conversation through the chat template, answer header included, and its images in order.

        Raises ValueError for messages that are not in the expected form or hold control tokens, and for those that the
        template refuses.
        """
        from jinja2 import TemplateError

        turns, images = self._read(messages)
        self._check_strings(tools or [], "tools", is_structured=True)
        try:
            text = self.tokenizer.apply_chat_template(
                turns,
                tools=tools,
                chat_template=self.chat_template,
                tokenize=False,
                add_generation_prompt=True,
                **(template_kwargs or {}),
            )
        except TemplateError as error:
            raise ValueError(f"the chat template refuses this conversation: {error}") from error
        return text, images

    def tokens(self, text: str) -> ChatTokens:
        """Token ids of rendered text, one placeholder per image; nothing is supervised in a prompt."""
        ids = np.array(self.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int64)
        return ChatTokens(ids, np.zeros(len(ids), dtype=bool))

    def prune_images(self, images: list[ImageRef]) -> list[PrunedImage]:
        """Decode, resize and select all images of a prompt, whose answer comes behind them.

        Raises ImageError saying which image it was.
        """
        prune = self.prune.resolved(last_turn_only=True)
        return [image for image, _ in prune_shots(shots_of(images), prune, self.resize)]

    def _read(self, messages: Messages) -> tuple[Messages, list[ImageRef]]:
        """Messages as templates take them (images without their content), and the images."""
        turns: Messages = []
        images: list[ImageRef] = []
        for number, message in enumerate(messages, start=1):
            if not isinstance(message, Mapping) or "role" not in message:
                raise ValueError(f"message {number}: expected a dict with 'role' and 'content', got {_short(message)}")
            content = message.get("content")
            if isinstance(content, list | tuple):
                content = [self._read_part(part, f"message {number}", images) for part in content]
            elif content is not None:
                self._check_text(content, f"message {number}")
            others = {key: value for key, value in message.items() if key not in ("role", "content")}
            self._check_strings(others, f"message {number}", is_structured=True)
            turns.append({**message, "content": content})
        return turns, images

    def _read_part(self, part: Any, where: str, images: list[ImageRef]) -> dict[str, Any]:
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        if not isinstance(part, Mapping):
            raise ValueError(f"{where}: expected text and image parts, got {_short(part)}")
        kind = part.get("type") or next((name for name in ("image", "image_url", "text") if name in part), None)
        if kind in IMAGE_TYPES:
            try:
                image = image_of_part(read_keys(part, ("type", *IMAGE_KEYS), NO_RULES, "part"))
            except RecordError as error:
                raise ValueError(f"{where}: {error}") from error
            if image is None:
                raise ValueError(f"{where}: expected an image part with one of {', '.join(IMAGE_KEYS)}")
            images.append(image)
            return {"type": "image"}
        if kind in TEXT_TYPES:
            self._check_text(part.get("text"), where)
            return {"type": "text", "text": part["text"]}
        raise ValueError(f"{where}: parts of type {kind!r} are not supported, expected text or image")

    def _check_text(self, text: Any, where: str) -> None:
        if not isinstance(text, str):
            raise ValueError(f"{where}: expected text as a string, got {_short(text)}")
        if self.image_token in text:
            raise ValueError(f"{where}: the text contains {self.image_token!r}; give the image as a part of its own")
        self._check_strings([text], where)

    def _check_strings(self, value: Any, where: str, *, is_structured: bool = False) -> None:
        """No string may hold a control token, nor become one between a template's own < and >, as in training."""
        for text in strings_in(value):
            whole = f"<{text}>" if is_structured else text
            forged = next((token for token in self._control_tokens if token in whole), None)
            if forged:
                raise ValueError(f"{where}: the text contains {would_forge(forged)}")
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"{where}: the text is not valid Unicode: {error}") from error

    @cached_property
    def _control_tokens(self) -> tuple[str, ...]:
        return control_tokens(self.tokenizer, grounding_tokens=self.grounding_tokens)


def shots_of(images: Sequence[ImageRef]) -> list[Shot]:
    """The images of messages, as they are pruned together."""
    return [Shot(ref.source, ref.wish, ref.starts_session) for ref in images]


def _from_processor(processor: Any) -> dict[str, Any]:
    tokenizer = processor.tokenizer
    image_token_id = getattr(processor, "image_token_id", None)
    if image_token_id is None:
        token = getattr(processor, "image_token", None) or "<|image_pad|>"
        image_token_id = tokenizer.get_vocab().get(token)
    if image_token_id is None:
        raise ValueError("the processor names no image token; give the model folder instead")
    image_processor = getattr(processor, "image_processor", None)
    preprocessor = {
        key: getattr(image_processor, key)
        for key in ("size", "image_mean", "image_std")
        if getattr(image_processor, key, None) is not None
    }
    return _parts(tokenizer, getattr(processor, "chat_template", None), image_token_id, preprocessor)


def _parts(
    tokenizer: Any, chat_template: str | None, image_token_id: int, preprocessor: dict[str, Any]
) -> dict[str, Any]:
    """What both kinds of source end in. A processor leads to its folder through its tokenizer."""
    chat_template = chat_template or tokenizer.chat_template
    path = tokenizer.name_or_path
    if not isinstance(chat_template, str):
        stored = read_model_file(path, "chat_template.json")  # where older folders keep it
        chat_template = json.loads(stored)["chat_template"] if stored else None
    if not chat_template:
        raise ValueError(f"{path}: the tokenizer has no chat template")
    stored = read_model_file(path, PRUNE_FILE)
    return {
        "tokenizer": tokenizer,
        "chat_template": chat_template,
        "image_token_id": int(image_token_id),
        "image_mean": tuple(preprocessor.get("image_mean", (0.5, 0.5, 0.5))),
        "image_std": tuple(preprocessor.get("image_std", (0.5, 0.5, 0.5))),
        "preprocessor": preprocessor,
        "trained_with": read_prune_file(stored, f"{path}/{PRUNE_FILE}") if stored else None,
    }


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
