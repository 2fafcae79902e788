"""From an image of a record to its encoded bytes, inside the folder the source declares."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from PIL import Image

from pixelprune.images.image_file import MAX_FILE_BYTES, ImageError, read_image_file
from pixelprune.records.record import ImageRef, RecordError

__all__ = ["ImageRoot", "Root", "read_image"]


class ImageRoot(Protocol):
    """A folder of images that is no local one."""

    def read(self, name: str, max_bytes: int) -> bytes:
        """The encoded bytes of an image inside the folder. Raises RecordError as `read_image` does."""


Root = Path | ImageRoot
"""What image paths are relative to."""


def read_image(ref: ImageRef, root: Root | None, max_bytes: int = MAX_FILE_BYTES) -> bytes | Image.Image:
    """The encoded bytes of an image, at most max_bytes (or the picture, if it came decoded).

    Paths are taken relative to `root` and may not lead out of it, neither by `..`, nor as absolute paths, nor through
    a symlink: a record must not make a run read other files. Absolute paths below the root are fine.
    Raises RecordError with reason outside_root, no_root, missing_file, unreadable_file, empty_file, file_too_large or
    not_an_image.
    """
    if not isinstance(ref.source, str):
        if ref.source == b"":
            raise RecordError("empty_file", "an image of zero bytes")
        if isinstance(ref.source, bytes) and len(ref.source) > max_bytes:
            raise RecordError(
                "file_too_large", f"an image of {len(ref.source)} bytes, more than data.max_file_bytes={max_bytes}"
            )
        return ref.source
    if root is None:
        raise RecordError("no_root", f"image {ref.source!r} is a path, but the source has no root (sources[].root)")
    if not isinstance(root, Path):
        return root.read(ref.source, max_bytes)
    try:
        path = (root / ref.source).resolve()
        if not path.is_relative_to(root.resolve()):
            raise RecordError("outside_root", f"image {ref.source!r} lies outside the source's root (sources[].root)")
        return read_image_file(path, f"image {ref.source[:200]!r} under the source's root", max_bytes)
    except ImageError as error:
        raise RecordError(error.reason, str(error)) from error
    except RecordError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        # ValueError: a NUL byte in the name; RuntimeError or OSError: a loop of symlinks, no permission.
        raise RecordError("unreadable_file", f"image {ref.source[:200]!r} cannot be read: {error}") from error
