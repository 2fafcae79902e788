"""Generation with pruned images on stock Hugging Face models: `prepare`, then `generate`. Nothing is patched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pixelprune.attention.shared_cache import shared_cache
from pixelprune.decoding import decode, end_token_ids, generation_settings, trim
from pixelprune.family import family_of
from pixelprune.model_call import image_features
from pixelprune.pack import VisionGeometry, pack_samples, row_pictures
from pixelprune.prompter import Messages, Prompter
from pixelprune.sample import Sample, build_sample
from pixelprune.settings import PruneSettings, ResizeSettings

__all__ = [
    "Generation",
    "PrunedInputs",
    "encode_images",
    "generate",
    "model_arguments",
    "padded_rows",
    "prefill_logits",
    "prepare",
    "stock_model",
]

# B = conversations, L = tokens of the longest prompt, V = vocabulary


@dataclass(frozen=True)
class PrunedInputs:
    """Prompts ready for any stock model of their family: still on the host, independent of device and dtype.

    samples: one per conversation; texts: the prompts as the chat template rendered them.
    """

    samples: list[Sample]
    texts: list[str]
    prompter: Prompter

    @property
    def num_kept_blocks(self) -> int:
        return sum(image.selection.num_kept for sample in self.samples for image in sample.images)

    @property
    def num_blocks(self) -> int:
        """Blocks of all images before pruning."""
        return sum(image.num_full_blocks for sample in self.samples for image in sample.images)

    @property
    def retain_ratio(self) -> float:
        """Kept blocks / all blocks over all images; 1.0 without images."""
        return self.num_kept_blocks / self.num_blocks if self.num_blocks else 1.0

    @property
    def num_tokens(self) -> int:
        """Tokens of all prompts, padding not counted."""
        return sum(len(sample) for sample in self.samples)


@dataclass(frozen=True)
class Generation:
    """What was generated: texts without special tokens, ids up to and including the end token, the stock output.

    With `num_return_sequences=n` there are n entries per conversation, in order. `output` carries scores or logits
    where `output_scores` or `output_logits` asked for them.
    """

    texts: list[str]
    token_ids: list[list[int]]
    output: Any

    @property
    def text(self) -> str:
        """The only answer. Raises ValueError when there are several."""
        if len(self.texts) != 1:
            raise ValueError(f"{len(self.texts)} answers were generated; read .texts")
        return self.texts[0]


def prepare(
    source: Any,
    messages: Messages | list[Messages],
    *,
    prune: PruneSettings | str | None = None,
    resize: ResizeSettings | None = None,
    tools: list[Any] | None = None,
    template_kwargs: dict[str, Any] | None = None,
    grounding_tokens: bool | None = None,
    trust_remote_code: bool = False,
) -> PrunedInputs:
    """Messages with images -> prompts in which only kept blocks remain, at their original 2-D positions.

    source: a model folder, a hub id, a processor, or a `Prompter` (loaded once, for many calls).
    messages: one conversation, or a list of conversations for a batch, in Hugging Face or OpenAI form; images as
    path, bytes, picture or uint8 array.
    prune, resize, grounding_tokens, trust_remote_code: see `Prompter.load`; a Prompter brings its own.
    Raises ValueError for messages that cannot be used and ImageError (a ValueError) for images that cannot.
    """
    if isinstance(source, Prompter):
        if any(given is not None for given in (prune, resize, grounding_tokens)):
            raise ValueError("a Prompter brings its own prune and resize settings; give them to Prompter.load")
        prompter = source
    else:
        prompter = Prompter.load(
            source,
            prune=prune,
            resize=resize,
            grounding_tokens=grounding_tokens,
            trust_remote_code=trust_remote_code,
        )
    if not isinstance(messages, list | tuple) or not messages:
        raise ValueError("expected a conversation (a list of messages) or a list of conversations, got none")
    conversations = [messages] if isinstance(messages[0], Mapping) else messages
    samples, texts = [], []
    for number, conversation in enumerate(conversations, start=1):
        try:
            text, images = prompter.render(list(conversation), tools=tools, template_kwargs=template_kwargs)
            sample = build_sample(
                prompter.tokens(text),
                prompter.prune_images(images),
                image_token_id=prompter.image_token_id,
                record_id=f"conversation {number}",
            )
        except ValueError as error:
            if len(conversations) > 1:
                error.args = (f"conversation {number}: {error}",)
            raise
        samples.append(sample)
        texts.append(text)
    return PrunedInputs(samples, texts, prompter)


@torch.no_grad()
def generate(
    model: Any,
    inputs: PrunedInputs,
    *,
    max_new_tokens: int | None = None,
    features: dict[str, Any] | None = None,
    **generate_kwargs: Any,
) -> Generation:
    """The stock `model.generate` on pruned prompts; every other argument (sampling, beams, streamer) is the stock one.

    Several conversations are left-padded into one batch. A streamer needs a batch of one, as in the stock method. A
    picture that several of them show is encoded once, and what prompts begin with alike is prefilled once, where the
    model has no linear-attention layers and the call keeps one sequence per prompt in the cache it makes itself.
    max_new_tokens: left out, the generation config's, otherwise 256. features: of the kept blocks, where they are
    not to be those of `encode_images`.
    Raises ValueError for arguments that are made here, for assisted decoding, for a model in training mode and for a
    model of another family than the prompts.
    """
    settings = generation_settings(model, inputs.prompter, max_new_tokens, generate_kwargs)
    encoded = encode_images(model, inputs.samples, inputs.prompter) if features is None else features
    arguments = padded_rows(model, inputs) | encoded
    if features is None and _can_share(model, inputs, generate_kwargs):
        stock = stock_model(model, inputs.prompter)
        if shared := shared_cache(stock, inputs.samples, inputs.prompter.image_token_id, encoded):
            arguments = padded_rows(model, inputs) | {"past_key_values": shared.cache} | shared.features
    output = model.generate(**arguments, **settings)
    output.past_key_values = None  # the memory goes with the answer, not with the result
    rows = output.sequences[:, arguments["input_ids"].shape[1] :].tolist()
    ends = end_token_ids(model, generate_kwargs)
    token_ids = [trim(row, ends, generate_kwargs.get("pad_token_id", inputs.prompter.pad_token_id)) for row in rows]
    return Generation(decode(inputs.prompter, token_ids), token_ids, output)


def _can_share(model: Any, inputs: PrunedInputs, generate_kwargs: dict[str, Any]) -> bool:
    """Whether a cache made beforehand is what the stock `generate` would have made of the prompts."""
    if len(inputs.samples) == 1 or family_of(stock_model(model, inputs.prompter).config).linear_attention:
        return False
    config = generate_kwargs.get("generation_config") or model.generation_config

    def asked(name: str) -> Any:
        return generate_kwargs.get(name, getattr(config, name, None))

    one_sequence = all((asked(name) or 1) == 1 for name in ("num_beams", "num_return_sequences"))
    own_cache = asked("use_cache") is not False and not asked("cache_implementation")
    return one_sequence and own_cache and not asked("prefill_chunk_size")


@torch.no_grad()
def prefill_logits(model: Any, inputs: PrunedInputs) -> torch.Tensor:
    """Logits (B, V) in float32 of the first token to be generated: one forward pass over the prompts, no cache kept."""
    logits = model(**model_arguments(model, inputs), use_cache=False, logits_to_keep=1).logits
    return logits[:, -1].float()


def model_arguments(model: Any, inputs: PrunedInputs) -> dict[str, Any]:
    """What the stock forward and the stock `generate` take: the left-padded rows and the encoded images."""
    return padded_rows(model, inputs) | encode_images(model, inputs.samples, inputs.prompter)


def padded_rows(model: Any, inputs: PrunedInputs) -> dict[str, torch.Tensor]:
    """The prompts as left-padded rows on the model's device.

    input_ids, attention_mask (B, L) and position_ids (4, B, L): row 0 counts the tokens of each
    row, rows 1-3 are MRoPE of the unpruned sequences. The stock `generate` continues each position row by one per
    token, which is `Sample.next_position` because a prompt ends in text.
    """
    samples, pad = inputs.samples, inputs.prompter.pad_token_id
    longest = max(len(sample) for sample in samples)
    ids = np.full((len(samples), longest), pad, dtype=np.int64)
    mask = np.zeros((len(samples), longest), dtype=np.int64)
    positions = np.zeros((4, len(samples), longest), dtype=np.int64)
    for row, sample in enumerate(samples):
        if sample.position_ids[:, -1].tolist() != [sample.next_position - 1] * 3:
            raise ValueError("the prompt ends in an image; expected text behind it (the chat template's answer header)")
        start = longest - len(sample)
        ids[row, start:] = sample.input_ids
        mask[row, start:] = 1
        positions[0, row, start:] = np.arange(len(sample))
        positions[1:, row, start:] = sample.position_ids
    device = model.get_input_embeddings().weight.device
    rows = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    return {name: torch.from_numpy(array).to(device) for name, array in rows.items()}


def encode_images(model: Any, samples: list[Sample], prompter: Prompter) -> dict[str, Any]:
    """The stock vision tower over the kept blocks of all images, one picture once; empty where there are none."""
    stock = stock_model(model, prompter)
    normalisation = {"image_mean": prompter.image_mean, "image_std": prompter.image_std}
    geometry = VisionGeometry.from_config(stock.config, normalisation)
    vision = stock.model.visual
    # What images of a session stand on may be turns that are cached, and not among these samples: they go one by one.
    in_session = any(image.selection.image is not None for sample in samples for image in sample.images)
    pictures = None if in_session else row_pictures(samples)
    pack = pack_samples(samples, geometry, pictures=pictures).to(next(vision.parameters()).device)
    if not pack.num_patches:
        return {}
    return {"mm_encoder_outputs": {"image": image_features(stock, pack, geometry, vision.dtype)}}


def stock_model(model: Any, prompter: Prompter) -> Any:
    """The stock model inside a PEFT wrapper, or the model itself.

    Raises ValueError for a model in training mode: with gradient checkpointing it drops the cache without a word, and
    generates from the last token alone. Also for a model with another image token than the prompts.
    """
    stock = model.get_base_model() if hasattr(model, "get_base_model") else model
    if stock.training:
        raise ValueError("the model is in training mode; call model.eval() first")
    expected = getattr(stock.config, "image_token_id", None)
    if prompter.image_token_id != expected:
        raise ValueError(
            f"the prompts use image token {prompter.image_token_id}, the model expects {expected}; "
            "prepare them with the model's own folder"
        )
    return stock
