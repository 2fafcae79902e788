"""One row of a source -> a pruned sample: the only path, used alike by the index, the loader and the collator."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import numpy as np
import xxhash
from PIL import ExifTags, Image

from pixelprune.images.image import ImageError, PrunedImage, read_size
from pixelprune.images.image_file import MAX_FILE_BYTES
from pixelprune.model_folder import ModelFolder
from pixelprune.records.chat import ChatEncoder
from pixelprune.records.images import Root, read_image
from pixelprune.records.keys import NO_RULES, KeyRules
from pixelprune.records.limits import DEFAULT_LIMITS, RecordLimits
from pixelprune.records.objects import PLAIN_STYLE, ObjectStyle, written
from pixelprune.records.presets import AS_RECORDED, Preset
from pixelprune.records.reader import parse_record
from pixelprune.records.record import ImageRef, ObjectMark, Record, RecordError, of_the_record
from pixelprune.records.token_answers import is_open, with_end_alone
from pixelprune.sample import ChatTokens, Sample, build_sample
from pixelprune.selection.registry import is_in_time
from pixelprune.sessions.pruning import Shot, prune_shots
from pixelprune.settings import PruneSettings, ResizeSettings
from pixelprune.text.steps import Steps, all_at_once

__all__ = [
    "PictureMemo",
    "PicturePair",
    "PrepareSettings",
    "PreparedRecord",
    "Preparer",
    "ShotKey",
    "hash_content",
    "with_objects_written",
]

ShotKey = tuple[Shot, ...]
"""Pictures with the hash of their bytes as source: each by itself, or all of a conversation together."""
PicturePair = tuple[PrunedImage, PrunedImage | None]
"""A picture pruned and, `with_full`, on all its blocks."""


class PictureMemo(Protocol):
    """Pictures prepared before; a dictionary is one."""

    def __contains__(self, key: ShotKey, /) -> bool: ...
    def __getitem__(self, key: ShotKey, /) -> list[PicturePair]: ...
    def __setitem__(self, key: ShotKey, pairs: list[PicturePair], /) -> None: ...


@dataclass(frozen=True)
class PreparedRecord:
    """A record after pruning. `content_hash` covers its text, roles, tools, reasoning, what is trained on,
    image bytes and the sizes stated for them: what the sample was made of.

    full: the same conversation on all its tokens, for a teacher; its images have no pixels of their own where the
    pruning is recoverable, since they can be decoded from the sample's (None unless `with_full`).
    """

    record: Record
    sample: Sample
    content_hash: int
    full: Sample | None = None
    has_no_answer: bool = False
    """The record ended with a question: its answer is the end token alone, and not to be trained on."""

    @property
    def num_images(self) -> int:
        return len(self.sample.images)


@dataclass(frozen=True)
class PrepareSettings:
    """What turns a row into a sample, in a form that travels to worker processes."""

    model_path: str
    prune: PruneSettings
    resize: ResizeSettings
    last_turn_only: bool = False
    with_full: bool = False
    """Prepare the unpruned sample too; the pruned one does not depend on it."""
    ignore_keys: tuple[str, ...] = ()
    """Keys of records that say nothing about training, beyond those known (`pixelprune.records.keys.HARMLESS`)."""

    trust_remote_code: bool = False
    supervise_empty_reasoning: bool = True
    """Train on the empty reasoning block that a template writes, as far as its generation prompt does not give it."""
    answer_format: str = "auto"
    """How the places of a record's `objects` are written (`pixelprune.answers.FORMATS`)."""
    grounding_tokens: bool = False
    """Write things and boxes of `objects` between the model's own tokens for them, which texts may then hold, too."""

    limits: RecordLimits = DEFAULT_LIMITS
    takes_open: bool = False
    """Take records that end with a question and train on none of their answers: another answers them later."""

    def build(self) -> Preparer:
        """Open the model folder. Raises ValueError when there is nothing that takes images."""
        return self.build_from(ModelFolder.open(self.model_path, trust_remote_code=self.trust_remote_code))

    def build_from(self, folder: ModelFolder) -> Preparer:
        """From a folder that is open already."""
        prune = self.prune.resolved(last_turn_only=self.last_turn_only)
        chat = ChatEncoder(
            folder.tokenizer,
            last_turn_only=self.last_turn_only,
            supervise_empty_reasoning=self.supervise_empty_reasoning,
            grounding_tokens=self.grounding_tokens,
        )
        rules = KeyRules.ignoring(self.ignore_keys)
        token = folder.config.image_token_id
        style = ObjectStyle(self.answer_format, self.grounding_tokens)
        return Preparer(chat, prune, self.resize, token, self.with_full, rules, self.limits, style, self.takes_open)

    def fingerprint(self, preparer: Preparer) -> dict[str, Any]:
        """Everything a sample depends on besides its record: two equal fingerprints give equal samples."""
        tokenizer = preparer.chat.tokenizer
        vocabulary = xxhash.xxh3_128(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
        return {
            "prune": _what_counts(preparer.prune),
            "resize": asdict(self.resize),
            "last_turn_only": self.last_turn_only,
            "ignore_keys": sorted(self.ignore_keys),
            "limits": asdict(self.limits),
            "supervise_empty_reasoning": self.supervise_empty_reasoning,
            "answer_format": self.answer_format,
            "grounding_tokens": self.grounding_tokens,
            "tokenizer": vocabulary,
            "chat_template": xxhash.xxh3_128(tokenizer.chat_template.encode()).hexdigest(),
            "image_token_id": preparer.image_token_id,
            **({"takes_open": True} if self.takes_open else {}),
        }


@dataclass(frozen=True)
class Preparer:
    """Settings that turn a row into a sample: chat template, pruning, sizes."""

    chat: ChatEncoder
    prune: PruneSettings
    resize: ResizeSettings
    image_token_id: int
    with_full: bool = False
    rules: KeyRules = NO_RULES
    limits: RecordLimits = DEFAULT_LIMITS
    object_style: ObjectStyle = PLAIN_STYLE
    takes_open: bool = False

    def steps(
        self,
        row: Any,
        root: Root | None,
        *,
        record_format: str = "auto",
        preset: Preset = AS_RECORDED,
        record_id: str = "",
        expected_hash: int = -1,
        memo: PictureMemo | None = None,
    ) -> Steps[PreparedRecord]:
        """Parse, check, read, decode, resize, prune; pauses before the template, the tokenizer and the pictures.

        row: a mapping in any supported format, or a `Record`. preset: the prompt written around its questions.
        expected_hash: refuse a record whose content is another.
        memo: of the records of a pack, so that a picture of several is decoded, resized and selected once.
        Raises RecordError for whatever is wrong with the record or one of its images (reason `changed` for the hash).
        """
        with of_the_record():
            record = row if isinstance(row, Record) else parse_record(row, record_format, self.rules)
            self.limits.check(record)
            record = with_objects_written(record, root, self.object_style, self.limits.max_file_bytes)
            record = preset.apply(record)
            has_no_answer = self.takes_open and is_open(record)
            if has_no_answer:
                record = with_end_alone(record, self.chat.tokenizer.eos_token_id)
            chat = yield from self.chat.steps(record)
            yield
            pictures = [read_image(ref, root, self.limits.max_file_bytes) for ref in record.images]
            content_hash = hash_content(record, pictures)
            if expected_hash not in (-1, content_hash):
                raise RecordError("changed", "the record or an image of it changed since the index was built")
            prepared = self._pruned(record, chat, pictures, {} if memo is None else memo)
            sample = build_sample(
                chat, [image for image, _ in prepared], image_token_id=self.image_token_id, record_id=record_id
            )
            full = None
            if self.with_full:
                full_images = [full_image for _, full_image in prepared if full_image is not None]
                full = build_sample(chat, full_images, image_token_id=self.image_token_id, record_id=record_id)
            return PreparedRecord(record, sample, content_hash, full, has_no_answer)

    prepare = all_at_once(steps)

    def _check_direction(self, chat: ChatTokens) -> None:
        """Backward, what is trained on must have all images before it: it would see screenshots with holes whose blocks
        stand in later ones."""
        if not is_in_time(self.prune) or self.prune.direction != "backward" or not chat.supervised.any():
            return
        images = np.flatnonzero(chat.input_ids == self.image_token_id)
        if len(images) > 1 and np.flatnonzero(chat.supervised)[0] < images[-1]:
            raise RecordError(
                "prune_direction",
                "a turn before the last image is trained on, and prune.direction=backward leaves out of earlier images "
                "what later ones show; expected data.last_turn_only=true, or prune.direction=forward",
            )

    def _pruned(
        self, record: Record, chat: ChatTokens, pictures: list[bytes | Image.Image], memo: PictureMemo
    ) -> list[PicturePair]:
        """Images pruned and, `with_full`, unpruned; each by itself, or together where the strategy looks at time."""
        num_placeholders = int((chat.input_ids == self.image_token_id).sum())
        if num_placeholders != len(pictures):
            raise RecordError(
                "image_count", f"the chat template wrote {num_placeholders} placeholders for {len(pictures)} images"
            )
        self._check_direction(chat)
        shots = [
            Shot(picture, ref.wish, ref.starts_session) for picture, ref in zip(pictures, record.images, strict=True)
        ]
        try:
            if is_in_time(self.prune):
                return self._remembered(tuple(shots), memo)
            return [pair for shot in shots for pair in self._remembered((shot,), memo)]
        except ImageError as error:
            raise RecordError(error.reason, f"{_name_images(record)}: {error}") from error

    def _remembered(self, shots: ShotKey, memo: PictureMemo) -> list[PicturePair]:
        """Taken from the memo where the same bytes came before."""
        hashed = [(shot, xxhash.xxh3_128_digest(shot.source)) for shot in shots if isinstance(shot.source, bytes)]
        if len(hashed) < len(shots):  # a decoded picture
            return prune_shots(shots, self.prune, self.resize, with_full=self.with_full)
        key = tuple(replace(shot, source=digest) for shot, digest in hashed)
        if key not in memo:
            memo[key] = prune_shots(shots, self.prune, self.resize, with_full=self.with_full)
        return memo[key]


def _what_counts(prune: PruneSettings) -> dict[str, Any]:
    """The settings that the strategy reads: those of sessions are no reason to measure all images anew without it."""
    settings = asdict(prune)
    if prune.budget == "pred2d":
        del settings["budget"]
    if not is_in_time(prune):
        del settings["direction"], settings["keep_replaced"]
    elif prune.direction == "backward":
        del settings["keep_replaced"]
    return settings


def with_objects_written(
    record: Record, root: Root | None, style: ObjectStyle, max_bytes: int = MAX_FILE_BYTES
) -> Record:
    """The record with its `objects` as text. Raises RecordError, also for images that cannot be read."""

    def size_of(ref: ImageRef) -> tuple[int, int, int]:
        try:
            return read_size(read_image(ref, root, max_bytes))
        except ImageError as error:
            raise RecordError(error.reason, f"{_name_images(record)}: {error}") from error

    return written(record, size_of, style)


def hash_content(record: Record, pictures: list[bytes | Image.Image]) -> int:
    """63-bit hash of everything a sample is made of (fits Parquet's int64)."""
    digest = xxhash.xxh3_64()
    for message in record.messages:
        role = message.role
        if role == "assistant" and message.weight != 1:
            role = f"assistant, weight {message.weight!r}" if message.supervised else "assistant, not trained on"
        digest.update(f"\x00{role}\x00{len(message.parts)}".encode())
        for part in message.parts:
            # Lengths go in before contents, so that no two records share one stream of bytes.
            assert not isinstance(part, ObjectMark), "written before"
            # Halves of a character pass: what refuses them names the record, and evaluation hashes before it asks.
            text = part.encode(errors="surrogatepass") if isinstance(part, str) else b""
            digest.update(f"\x00{'text' if isinstance(part, str) else 'image'}{len(text)}\x00".encode())
            digest.update(text)
        if message.template_fields:
            digest.update(_json_bytes(message.template_fields))
        if message.tokens is not None:
            digest.update(b"\x00tokens" + _json_bytes(list(asdict(message.tokens).values())))
    if record.tools:
        digest.update(b"\x00tools" + _json_bytes(record.tools))
    for ref, picture in zip(record.images, pictures, strict=True):
        if ref.starts_session:
            digest.update(b"\x00session")
        if ref.wish.stated:
            digest.update(b"\x00size" + _json_bytes(ref.wish.stated))
        if isinstance(picture, bytes):
            data = picture
        else:
            data = picture.tobytes()
            orientation = Image.Image.getexif(picture).get(ExifTags.Base.Orientation)
            form = picture.mode, picture.size, picture.getpalette(), picture.info.get("transparency"), orientation
            digest.update(f"\x00picture{form!r}".encode())
        digest.update(f"\x00{len(data)}\x00".encode())
        digest.update(data)
    return digest.intdigest() >> 1


def _json_bytes(value: Any) -> bytes:
    """JSON text behind its length; escaped, so that every string has bytes. Keys keep their order, as templates do."""
    text = json.dumps(value).encode()
    return f"\x00{len(text)}\x00".encode() + text


def _name_images(record: Record) -> str:
    names = [ref.source for ref in record.images if isinstance(ref.source, str)]
    return ", ".join(names) if names else "embedded image"
