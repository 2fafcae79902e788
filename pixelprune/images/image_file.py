"""An image's file: what is opened at all, how much of it is read, and which formats are known.

A FIFO, a device or a socket would be waited for without end, and a sparse file of no bytes on disk fills the memory: a
file is opened if it is regular, and read if its size and its first bytes allow it.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

# Importing a plugin is what registers its reader; the others, Pillow has some 40, never see a byte of a data set.
from PIL import (
    BmpImagePlugin,  # noqa: F401
    GifImagePlugin,  # noqa: F401
    Image,
    JpegImagePlugin,  # noqa: F401
    PngImagePlugin,  # noqa: F401
    TiffImagePlugin,  # noqa: F401
    WebPImagePlugin,  # noqa: F401
)

__all__ = ["FORMATS", "MAX_FILE_BYTES", "ImageError", "as_image_error", "open_image", "open_regular", "read_image_file"]

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""The file formats that are read, by Pillow's names (JPEG covers MPO, several JPEGs in one file)."""

MAX_FILE_BYTES = 256 << 20
"""Largest image file that is read, unless the caller says otherwise."""

_PREFIX_BYTES = 16
"""Enough for every reader to say whether a file is its own."""

_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
    stat.S_IFDIR: "a folder",
}


class ImageError(ValueError):
    """An image that cannot be used. `reason` is a short code for counting; the message names the image."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


def read_image_file(path: Path | str, name: str, max_bytes: int = MAX_FILE_BYTES) -> bytes:
    """The bytes of an image's file; name: as messages call it.

    Raises ImageError with reason missing_file, unreadable_file (no regular file among them), empty_file,
    file_too_large or not_an_image; the last three before more than its first bytes are read.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > max_bytes:
                raise ImageError(
                    "file_too_large",
                    f"{name}: a file of {size} bytes, more than data.max_file_bytes={max_bytes}; raise the limit if "
                    "the image is meant to be that large",
                )
            prefix = file.read(_PREFIX_BYTES)
            if prefix and not any(_accepts(image_format, prefix) for image_format in FORMATS):
                raise _not_an_image(name)
            data = prefix + file.read(size - len(prefix)) if size > len(prefix) else prefix
    except FileNotFoundError as error:
        raise ImageError("missing_file", f"{name}: no such file") from error
    except OSError as error:
        raise ImageError("unreadable_file", f"{name}: {error.strerror}") from error
    if not data:
        raise ImageError("empty_file", f"{name}: the file is empty")
    return data


def open_regular(path: Path | str) -> BinaryIO:
    """Open for reading what is a regular file, never waiting for a writer. Raises OSError, also for anything else.

    Looked at before it is opened, since opening alone can make a device act, and again after, when it may be another.
    """
    _refuse_others(os.stat(path).st_mode, path)
    number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _refuse_others(os.fstat(number).st_mode, path)
        return os.fdopen(number, "rb")
    except OSError:
        os.close(number)
        raise


def open_image(file: BinaryIO, name: str) -> Image.Image:
    """Read the header of an image file in one of FORMATS; no pixel is decoded.

    The readers are called directly, not through `Image.open`: that would refuse, or warn of, large pictures by a limit
    that is one global for the whole process, whatever ours is.
    Raises ImageError (not_an_image, truncated_image, decompression_bomb).
    """
    prefix = file.read(_PREFIX_BYTES)
    for image_format in FORMATS:
        if not _accepts(image_format, prefix):
            continue
        file.seek(0)
        make, _ = Image.OPEN[image_format]
        with as_image_error(name), suppress(SyntaxError, IndexError, TypeError, struct.error):
            return make(file, "")  # those four mean "not mine" to Image.open, too
    raise _not_an_image(name)


@contextmanager
def as_image_error(name: str) -> Iterator[None]:
    """Whatever a decoder raises in here is the image's fault: ImageError, but for a shortage of memory."""
    try:
        yield
    except (ImageError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        # The readers of WebP and TIFF hold pictures to Pillow's own limit (179 million pixels) in any case.
        raise ImageError("decompression_bomb", f"{name}: {error} (PIL.Image.MAX_IMAGE_PIXELS)") from error
    except Exception as error:
        # Pillow's decoders and the libraries below them signal damaged files with whatever class comes up on the way
        # (OSError, struct.error, KeyError, RuntimeError, ...), and one bad file must not end the pass over all.
        what = " ".join(str(error).split()) or type(error).__name__
        raise ImageError("truncated_image", f"{name}: damaged or truncated image ({what})") from error


def _accepts(image_format: str, prefix: bytes) -> bool:
    _, accepts = Image.OPEN[image_format]
    return accepts is None or accepts(prefix) is True


def _not_an_image(name: str) -> ImageError:
    return ImageError("not_an_image", f"{name}: not a readable image file, expected one of {', '.join(FORMATS)}")


def _refuse_others(mode: int, path: Path | str) -> None:
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "something else")
        raise OSError(0, f"it is {kind}, expected a regular file", str(path))
