"""One conversation after pruning: token ids, the positions of the unpruned sequence, and what is supervised."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from pixelprune.images.image import PrunedImage
from pixelprune.selection import Selection
from pixelprune.settings import MERGE

__all__ = ["ChatTokens", "Sample", "build_sample", "mrope_of_image"]

# L = tokens of the pruned row, n = tokens of the chat with one placeholder per image, K = kept blocks


@dataclass(frozen=True)
class ChatTokens:
    """A tokenised conversation in which every image is still one placeholder id.

    input_ids: int64 (n,); supervised: bool (n,), True for tokens the model is trained to predict.
    weights: float32 (n,), what each token's loss is multiplied with; above 0 exactly where supervised (None: 1 there).
    """

    input_ids: np.ndarray
    supervised: np.ndarray
    weights: np.ndarray | None = None


@dataclass(frozen=True)
class Sample:
    """A pruned conversation, ready to be packed.

    input_ids int64 (L,), position_ids int64 (3, L) (temporal, height, width MRoPE of the *unpruned* sequence),
    supervised bool (L,), images in order, next_position = the MRoPE position of the next generated token,
    weights float32 (L,) as in `ChatTokens`.
    """

    input_ids: np.ndarray
    position_ids: np.ndarray
    supervised: np.ndarray
    images: list[PrunedImage]
    next_position: int
    record_id: str = field(default="", compare=False)
    weights: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def num_supervised(self) -> int:
        return int(self.supervised.sum())

    @property
    def supervised_weights(self) -> np.ndarray:
        """float32 (num_supervised,): the weights of the supervised tokens, in order."""
        if self.weights is None:
            return np.ones(self.num_supervised, dtype=np.float32)
        return np.asarray(self.weights[self.supervised])

    @property
    def loss_weight(self) -> float:
        """Sum of the supervised tokens' weights: what this sample adds to the divisor of its step."""
        return float(self.supervised_weights.sum(dtype=np.float64))

    def weighted(self, factor: float) -> Sample:
        """The same with the weights of all supervised tokens multiplied by this, in float32."""
        if factor == 1:
            return self
        weights = self.supervised.astype(np.float32) if self.weights is None else self.weights
        return replace(self, weights=weights * np.float32(factor))

    @property
    def num_patches(self) -> int:
        """ViT patches over all images: MERGE x MERGE of them for every kept block."""
        return MERGE * MERGE * sum(image.selection.num_kept for image in self.images)


def build_sample(
    chat: ChatTokens, images: list[PrunedImage], *, image_token_id: int, first_position: int = 0, record_id: str = ""
) -> Sample:
    """Expand every placeholder to its image's kept blocks, with MRoPE positions of the unpruned sequence.

    first_position: where the sequence continues when earlier turns are already cached (0 otherwise).
    Raises ValueError when the number of placeholders is not the number of images.
    """
    placeholders = np.flatnonzero(chat.input_ids == image_token_id)
    if len(placeholders) != len(images):
        raise ValueError(
            f"record {record_id!r}: {len(placeholders)} image placeholders in the text, {len(images)} images"
        )
    position, cut = first_position, 0
    ids: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    for place, image in zip(placeholders.tolist(), images, strict=True):
        position = _append_text(ids, positions, chat.input_ids[cut:place], position)
        ids.append(np.full(image.selection.num_kept, image_token_id, dtype=np.int64))
        positions.append(mrope_of_image(image.selection, position))
        position += max(image.selection.keep.shape)
        cut = place + 1
    position = _append_text(ids, positions, chat.input_ids[cut:], position)
    repeats = np.ones(len(chat.input_ids), dtype=np.int64)
    repeats[placeholders] = [image.selection.num_kept for image in images]
    return Sample(
        input_ids=np.concatenate(ids),
        position_ids=np.concatenate(positions, axis=1),
        supervised=np.repeat(chat.supervised, repeats),
        images=images,
        next_position=position,
        record_id=record_id,
        weights=None if chat.weights is None else np.repeat(chat.weights, repeats),
    )


def mrope_of_image(selection: Selection, start: int) -> np.ndarray:
    """MRoPE positions int64 (3, K) of an image's kept blocks when the image begins at `start`.

    The temporal row is constant; height and width are the block's row and column in the original grid
    (Qwen3-VL's interleaved MRoPE; the text after the image continues at start + max(rows, cols)).
    """
    rows, cols = np.nonzero(selection.keep)
    return np.stack([np.full(len(rows), start), start + rows, start + cols]).astype(np.int64)


def _append_text(ids: list[np.ndarray], positions: list[np.ndarray], text_ids: np.ndarray, position: int) -> int:
    ids.append(text_ids)
    positions.append(np.broadcast_to(np.arange(position, position + len(text_ids)), (3, len(text_ids))))
    return position + len(text_ids)
