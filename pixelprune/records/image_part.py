"""What names an image in a message or a record, whoever wrote it -> a path, encoded bytes or a picture."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pixelprune.records.keys import NO_RULES, KeyRules
from pixelprune.records.record import RecordError

__all__ = ["IMAGE_KEYS", "image_of_part", "image_source"]

IMAGE_KEYS = ("image", "image_url", "path", "url", "base64")
"""Keys of an image part that hold its picture, OpenAI's and Hugging Face's among them."""

OBJECT_KEYS = ("bytes", "path", "url", "image")
"""Keys of an object in place of an image."""

_SCHEME = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://")


def image_of_part(part: Mapping[str, Any], rules: KeyRules = NO_RULES) -> str | bytes | Image.Image | None:
    """The image of a typed part, from the one key that holds it; None for a part that names none.

    Raises RecordError with reason bad_image, remote_image or unread_key.
    """
    given = [key for key in IMAGE_KEYS if part.get(key) is not None]
    if len(given) > 1:
        raise RecordError("bad_image", f"an image part has {' and '.join(given)}, expected one of them")
    if not given:
        return None
    value = part[given[0]]
    return _decoded(value, "base64 text") if given[0] == "base64" else image_source(value, rules)


def image_source(value: Any, rules: KeyRules = NO_RULES) -> str | bytes | Image.Image:
    """A path, data: URL, file: URL, bytes, picture, uint8 array (H, W), (H, W, 3) or (H, W, 4), or a mapping with one.

    Mappings are {"bytes", "path"} of `datasets` and {"url"} of OpenAI; None in them means absent. Nothing is fetched.
    Raises RecordError with reason bad_image, remote_image or unread_key.
    """
    if isinstance(value, Mapping):
        value = _image_of_object(value, rules)
        if isinstance(value, Mapping):
            value = _image_of_object(value, rules)
    if isinstance(value, Path):
        value = str(value)
    if isinstance(value, str) and value:
        if value.startswith("data:"):
            header, _, body = value.partition(",")
            if not header.endswith(";base64"):
                raise RecordError("bad_image", f"data URL {header[:60]!r} is not base64")
            return _decoded(body, f"data URL {header[:60]!r}")
        if _SCHEME.match(value) and not value.startswith("file://"):
            raise RecordError("remote_image", f"image {value[:80]!r} must be downloaded first and given as a file")
        return value.removeprefix("file://")
    if isinstance(value, np.ndarray):
        if value.dtype != np.uint8 or value.ndim not in (2, 3) or value.shape[2:] not in ((), (3,), (4,)):
            raise RecordError(
                "bad_image",
                f"image is an array of {value.dtype} {value.shape}, expected uint8 (H, W), (H, W, 3) or (H, W, 4)",
            )
        return Image.fromarray(value)
    if isinstance(value, bytes | Image.Image):
        return value
    raise RecordError("bad_image", f"image is {value!r:.80}, expected a path, bytes or a picture")


def _image_of_object(value: Mapping[str, Any], rules: KeyRules) -> Any:
    value = rules.checked(value, "image", OBJECT_KEYS)
    given = [key for key in OBJECT_KEYS if value.get(key)]
    if "bytes" in given:
        given = [key for key in given if key != "path"]  # the name of the bytes
    if len(given) > 1:
        raise RecordError("bad_image", f"an image has {' and '.join(given)}, expected one of them")
    return value[given[0]] if given else None


def _decoded(text: Any, what: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError, TypeError) as error:  # ValueError: characters beyond ASCII
        raise RecordError("bad_image", f"{what} is damaged: {error}") from error
