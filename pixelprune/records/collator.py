"""Records -> one packed row for the stock model.

Stands alone: it works in any torch `DataLoader`, in Hugging Face `Trainer` and in TRL's `SFTTrainer`. The framework's
own loader goes through the same object, so that there is one way from a record to a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from pixelprune.images.image import PrunedImage
from pixelprune.model_folder import ModelFolder
from pixelprune.pack import Pack, VisionGeometry, model_inputs, pack_samples
from pixelprune.records.prepare import Preparer, PrepareSettings
from pixelprune.records.record import RecordError
from pixelprune.sample import ChatTokens, Sample, build_sample
from pixelprune.selection import Selection
from pixelprune.settings import BLOCK, PruneSettings, ResizeSettings

__all__ = ["DUMMY_ID", "DUMMY_TOKENS", "IGNORED_LABEL", "PixelPruneCollator", "dummy_sample"]

IGNORED_LABEL = -100
"""What Hugging Face losses skip."""
DUMMY_ID = "dummy"
DUMMY_TOKENS = 3
"""Tokens of the dummy sample; it comes on top of data.pack_tokens."""


def dummy_sample(image_token_id: int) -> Sample:
    """One black block between two tokens, nothing supervised.

    It keeps the vision tower in the graph of a rank whose pack has no image, or of one without a pack. Three tokens,
    because the border of a one-token sample cannot be told from positions.
    """
    selection = Selection(np.ones((1, 1), dtype=bool), np.zeros((1, 1), dtype=np.int32))
    image = PrunedImage(np.zeros((1, BLOCK, BLOCK, 3), dtype=np.uint8), selection, (BLOCK, BLOCK))
    text_id = 0 if image_token_id != 0 else 1
    ids = np.array([text_id, image_token_id, text_id], dtype=np.int64)
    chat = ChatTokens(ids, np.zeros(DUMMY_TOKENS, dtype=bool))
    return build_sample(chat, [image], image_token_id=image_token_id, record_id=DUMMY_ID)


@dataclass(frozen=True)
class PixelPruneCollator:
    """A list of records -> the keyword arguments of the stock forward, labels in the row.

    root: folder that image paths are relative to and may not leave (None: records must bring their images).
    dummy_image: add a one-block image outside the loss to rows without one, so that all data-parallel ranks touch the
    same parameters in every backward.
    pixels: "patches", normalised float32 for any stock model, or "blocks", uint8 (K, 32, 32, 3) for one that
    `pixelprune.images.patch_embed.take_blocks` has prepared.
    """

    preparer: Preparer
    geometry: VisionGeometry
    root: Path | None = None
    dummy_image: bool = True
    pixels: Literal["patches", "blocks"] = "patches"

    def __post_init__(self) -> None:
        if self.pixels not in ("patches", "blocks"):
            raise ValueError(f'pixels: expected "patches" or "blocks", got {self.pixels!r}')

    @classmethod
    def from_pretrained(
        cls,
        model_path: str,
        *,
        prune: PruneSettings | None = None,
        resize: ResizeSettings | None = None,
        last_turn_only: bool = False,
        root: str | Path | None = None,
        dummy_image: bool = True,
        pixels: Literal["patches", "blocks"] = "patches",
        ignore_keys: Iterable[str] = (),
        answer_format: str = "auto",
        grounding_tokens: bool = False,
        trust_remote_code: bool = False,
    ) -> PixelPruneCollator:
        """For a model folder or hub id. Size limits of the images come from `resize`, not from the model's folder.

        ignore_keys, answer_format, grounding_tokens: as those of the trainer's `data`. Raises ValueError for an ignored
        key that is the conversation itself, and for a tokenizer without the tokens.
        """
        folder = ModelFolder.open(model_path, trust_remote_code=trust_remote_code)
        settings = PrepareSettings(
            model_path,
            prune or PruneSettings(),
            resize or ResizeSettings(),
            last_turn_only,
            ignore_keys=tuple(ignore_keys),
            answer_format=answer_format,
            grounding_tokens=grounding_tokens,
        )
        preparer = settings.build_from(folder)
        return cls(preparer, folder.geometry, Path(root) if root is not None else None, dummy_image, pixels)

    def __call__(self, records: Sequence[Any]) -> dict[str, Any]:
        """Records (mappings in any supported format, or `Record`) as one row on the CPU.

        Raises RecordError for a record that cannot be used: filter with `training.data.index` first, or catch it.
        Labels have no weights, so turns with a loss weight other than 0 and 1 are refused (reason bad_weight).
        """
        pack = self.pack([self.preparer.prepare(record, self.root).sample for record in records])
        if pack.is_weighted:
            raise RecordError("bad_weight", "labels cannot weigh a turn's loss; expected weights of 0 or 1")
        labels = torch.full_like(pack.input_ids, IGNORED_LABEL)
        labels[pack.logit_index + 1] = pack.labels
        inputs = model_inputs(pack, self.geometry, torch.float32, as_blocks=self.pixels == "blocks")
        return inputs | {"labels": labels[None]}

    def pack(self, samples: list[Sample]) -> Pack:
        """Samples as one packed row; the dummy alone when there are none."""
        return pack_samples(self.with_dummy(samples), self.geometry)

    def with_dummy(self, samples: list[Sample]) -> list[Sample]:
        """The samples, with the dummy behind them where the row needs it."""
        if not samples or (self.dummy_image and not any(sample.images for sample in samples)):
            return [*samples, dummy_sample(self.geometry.image_token_id)]
        return samples
