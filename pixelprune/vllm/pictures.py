"""Pictures as training decodes them: vLLM's own conversion clips 16-bit grey and rounds transparency otherwise."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image
from vllm.multimodal.media import MediaWithBytes

from pixelprune.settings import ResizeSettings

WHITE = (255, 255, 255)


def as_trained(data: Any, resize: ResizeSettings) -> Any:
    """The images of a request, each picture upright in RGB by `pixelprune.images.image.decode_image`.

    data: what vLLM takes as the modality "image". Arrays and embeddings pass as they are. Pictures that vLLM has
    converted already are decoded again, from the bytes that came with the request.
    Raises ValueError for a picture that training would refuse.
    """
    if isinstance(data, Image.Image | MediaWithBytes):
        return _upright_rgb(data, resize)
    return [_upright_rgb(item, resize) for item in data] if isinstance(data, list | tuple) else data


def _upright_rgb(item: Any, resize: ResizeSettings) -> Any:
    from pixelprune.images.image import decode_image  # numba must not load before vLLM's CPU worker has started

    if isinstance(item, Image.Image):
        return decode_image(item, resize)
    if not isinstance(item, MediaWithBytes):
        return item
    if not item.io_config:
        return MediaWithBytes(decode_image(item.media, resize), item.original_bytes)
    background = tuple(item.io_config.get("rgba_background_color", WHITE))
    if background != WHITE:
        raise ValueError(
            f"media_io_kwargs: rgba_background_color {background} is not the white that transparency was laid on in "
            "training; leave it out"
        )
    return MediaWithBytes(decode_image(item.original_bytes, resize), item.original_bytes, item.io_config)


def picture_of(image: Any, number: int) -> Image.Image:
    """A PIL picture of what offline callers may give. Raises ValueError for arrays that are no uint8 picture."""
    if isinstance(image, Image.Image):
        return image
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] not in (3, 4):
        raise ValueError(
            f"image {number}: expected a picture or a uint8 array of shape (H, W, 3) or (H, W, 4), "
            f"got {array.dtype} {array.shape}"
        )
    return Image.fromarray(array)
