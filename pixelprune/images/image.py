"""One image from bytes to kept blocks: decode -> resize -> select -> gather, all on uint8 in the worker."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from pixelprune.images.image_file import (
    FORMATS,
    ImageError,
    as_image_error,
    open_image,
    read_image_file,
)
from pixelprune.images.sizing import NO_WISH, SizeWish, wished_size
from pixelprune.selection import Selection, check_settings, select
from pixelprune.settings import BLOCK, PruneSettings, ResizeSettings

__all__ = [
    "FORMATS",
    "ImageError",
    "PrunedImage",
    "decode_image",
    "decode_pixels",
    "gather_blocks",
    "open_image",
    "prune_image",
    "prune_pixels",
    "read_size",
    "resize_image",
    "unpruned_without_pixels",
]

ImageSource = Path | str | bytes | Image.Image

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What sets a picture upright, by its EXIF orientation (Exif 2.3, tag 0x0112)."""


@dataclass(frozen=True)
class PrunedImage:
    """What leaves the worker: the kept blocks and where they stood.

    blocks: uint8 (K, 32, 32, 3), kept blocks in row-major order of their position.
    selection: keep mask and decoding sources over (rows, cols) blocks of the resized image.
    original_size: (height, width) in pixels before resizing.
    unscaled_blocks: set by the baseline "resize" alone: blocks before it scaled the image down to its budget.
    """

    blocks: np.ndarray
    selection: Selection
    original_size: tuple[int, int]
    unscaled_blocks: int = 0

    @property
    def num_full_blocks(self) -> int:
        """Blocks of the image that the Full model is given: what the kept ones are a share of."""
        return self.unscaled_blocks or self.selection.num_blocks


def decode_image(source: ImageSource, resize: ResizeSettings) -> Image.Image:
    """Decode to an RGB picture, upright.

    EXIF rotation is applied; transparency is laid on white (what a viewer of the screenshot sees); palette, grey and
    CMYK become RGB; 16-bit grey keeps its high byte. Of an animation the first frame is taken.

    Raises ImageError with reason missing_file, unreadable_file, empty_file, decompression_bomb, truncated_image,
    not_an_image, file_too_large or unsupported_mode. The size is checked from the header, before any pixel is decoded.
    """
    name = _describe(source)
    with as_image_error(name):
        picture = source if isinstance(source, Image.Image) else open_image(io.BytesIO(_read(source, name)), name)
        return _decoded(_not_too_large(picture, resize, name), name)


def decode_pixels(source: ImageSource, resize: ResizeSettings) -> np.ndarray:
    """The same picture as uint8 (H, W, 3), sooner where it is a PNG as screenshots are. Raises as `decode_image`."""
    name = _describe(source)
    if isinstance(source, Image.Image):
        return np.asarray(decode_image(source, resize))
    from pixelprune.images.png import png_pixels  # numba loads here, not with the package

    with as_image_error(name):
        data = _read(source, name)
        picture = _not_too_large(open_image(io.BytesIO(data), name), resize, name)
        pixels = png_pixels(data, picture)
        return np.asarray(_decoded(picture, name)) if pixels is None else pixels


def _not_too_large(picture: Image.Image, resize: ResizeSettings, name: str) -> Image.Image:
    width, height = picture.size
    if width * height > resize.max_decoded_pixels:
        raise ImageError(
            "decompression_bomb",
            f"{name}: {width}x{height} pixels exceed resize.max_decoded_pixels={resize.max_decoded_pixels}; "
            "raise the limit if the image is meant to be that large",
        )
    return picture


def _decoded(picture: Image.Image, name: str) -> Image.Image:
    picture.load()
    return _to_rgb(_set_upright(picture), name)


def read_size(source: ImageSource) -> tuple[int, int, int]:
    """(width, height) of the upright picture and its EXIF orientation, 1 (upright as stored) to 8; no pixel is decoded.

    Metadata behind a PNG's pixels is not looked for. Raises ImageError as `decode_image` does for headers.
    """
    name = _describe(source)
    with as_image_error(name):
        picture = source if isinstance(source, Image.Image) else open_image(io.BytesIO(_read(source, name)), name)
        try:
            # PNG's own getexif would decode all pixels to see what is behind them.
            orientation = Image.Image.getexif(picture).get(ExifTags.Base.Orientation, 1)
        except Exception:  # noqa: BLE001 - training, too, takes an image whose EXIF is damaged as it is stored
            orientation = 1
        width, height = picture.size
        orientation = orientation if orientation in range(1, 9) else 1
        is_on_its_side = orientation >= 5 and picture.format != "TIFF"  # whose size Pillow has turned already
        return (height, width, orientation) if is_on_its_side else (width, height, orientation)


def resize_image(picture: Image.Image | np.ndarray, resize: ResizeSettings, wish: SizeWish = NO_WISH) -> np.ndarray:
    """Bicubic resize to the Hugging Face processor's size: uint8 (H, W, 3), H and W multiples of 32.

    picture: decoded, as a picture or its pixels. wish: what the record says about this image's size.
    Raises ImageError: aspect_ratio for pictures more than 200 times as long as wide, bad_size for a wish that cannot
    be met.
    """
    height, width = picture.shape[:2] if isinstance(picture, np.ndarray) else picture.size[::-1]
    try:
        new_height, new_width = wished_size(height, width, resize, wish)
    except ValueError as error:
        reason = "bad_size" if wish.stated else "aspect_ratio"
        raise ImageError(reason, f"image of {width}x{height} pixels: {error}") from error
    image = np.asarray(picture)
    if (new_width, new_height) != (width, height):
        from pixelprune.images.resample import resize_bicubic  # numba loads here, not with the package

        image = resize_bicubic(image, new_height, new_width)
    return image


def gather_blocks(image: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """Copy the kept blocks of uint8 (H, W, 3) into (K, 32, 32, 3), row-major."""
    rows, cols = keep.shape
    grid = image.reshape(rows, BLOCK, cols, BLOCK, 3).swapaxes(1, 2)
    kept: np.ndarray = grid[keep]
    return kept


def prune_pixels(
    image: np.ndarray, prune: PruneSettings, original_size: tuple[int, int], budget: int | None = None
) -> PrunedImage:
    """Select on a resized uint8 image (H, W, 3) and gather what is kept.

    With strategy "resize" (a baseline of the paper's section 4) the image is scaled down, bicubic, until all its blocks
    are within the budget: what pred2d keeps of it at the same metric and threshold.
    budget: another one, in blocks, for a baseline.
    """
    if prune.strategy == "resize":
        return _scale_to_budget(image, prune, original_size, budget)
    if budget is not None:
        from pixelprune.selection.baselines import AT_BUDGET  # numba loads here, not with the package

        selection = AT_BUDGET[prune.strategy](image, prune, BLOCK, budget)
        return PrunedImage(gather_blocks(image, selection.keep), selection, original_size)
    selection = select(image, strategy=prune.strategy, metric=prune.metric, threshold=prune.threshold, seed=prune.seed)
    return PrunedImage(gather_blocks(image, selection.keep), selection, original_size)


def _scale_to_budget(
    image: np.ndarray, prune: PruneSettings, original_size: tuple[int, int], budget: int | None
) -> PrunedImage:
    from pixelprune.images.resample import resize_bicubic  # numba loads here, not with the package
    from pixelprune.selection.baselines import block_budget, budget_size

    check_settings(prune)
    height, width = image.shape[:2]
    size = budget_size(height, width, budget or block_budget(image, prune))
    scaled = image if size == (height, width) else resize_bicubic(image, *size)
    selection = select(scaled, strategy="none")
    unscaled_blocks = (height // BLOCK) * (width // BLOCK)
    return PrunedImage(gather_blocks(scaled, selection.keep), selection, original_size, unscaled_blocks)


def unpruned_without_pixels(image: PrunedImage) -> PrunedImage:
    """All blocks of an image kept, with none of their pixels: these are decoded on the device (Proposition 1)."""
    keep = np.ones_like(image.selection.keep)
    source = np.arange(keep.size, dtype=np.int32).reshape(keep.shape)
    return PrunedImage(image.blocks[:0], Selection(keep, source), image.original_size)


def prune_image(
    source: ImageSource, prune: PruneSettings, resize: ResizeSettings, wish: SizeWish = NO_WISH
) -> PrunedImage:
    """The whole walk of one image. Raises ImageError (see `decode_image`, `resize_image`)."""
    picture = decode_pixels(source, resize)
    return prune_pixels(resize_image(picture, resize, wish), prune, picture.shape[:2])


def _describe(source: ImageSource) -> str:
    if isinstance(source, bytes):
        return f"image of {len(source)} bytes"
    return "image" if isinstance(source, Image.Image) else str(source)


def _read(source: Path | str | bytes, name: str) -> bytes:
    data = source if isinstance(source, bytes) else read_image_file(source, name)
    if not data:
        raise ImageError("empty_file", f"{name}: the file is empty")
    return data


def _set_upright(picture: Image.Image) -> Image.Image:
    """The decoded picture turned as its EXIF says. A damaged EXIF says nothing: the pixels are whole."""
    try:
        turn = _UPRIGHT.get(picture.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # noqa: BLE001 - the parser raises as many classes as the decoders
        return picture
    if turn is None:
        return picture
    turned = picture.transpose(turn)
    # What stated the orientation goes, or decoding the result again would turn it again.
    turned.info = {key: value for key, value in turned.info.items() if key == "transparency"}
    return turned


def _to_rgb(picture: Image.Image, name: str) -> Image.Image:
    if picture.mode == "RGB" and "transparency" not in picture.info:
        return picture
    if picture.mode.startswith("I"):
        # Pillow's own conversion clips 16-bit values at 255 instead of scaling them.
        high_byte = (np.asarray(picture).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8)
        return Image.fromarray(high_byte).convert("RGB")
    if picture.mode == "F":
        raise ImageError("unsupported_mode", f"{name}: float pixels have no defined range; save it as 8-bit RGB")
    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        rgba = picture.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return picture.convert("RGB")
