"""What names an image in a message or a record, whoever wrote it -> path, encoded bytes or picture, and its size."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pixelprune.images.sizing import NO_WISH, SizeWish
from pixelprune.records.keys import NO_RULES, KeyRules, Level
from pixelprune.records.record import ImageRef, RecordError

__all__ = ["IMAGE_KEYS", "SESSION_KEY", "SIZE_KEYS", "image_of_part", "image_ref", "read_keys", "wish_of"]

IMAGE_KEYS = ("image", "image_url", "path", "url", "base64", "source")
"""Keys of an image part that hold its picture: OpenAI's, Hugging Face's, and Anthropic's `source`, an object."""

OBJECT_KEYS = ("bytes", "path", "url", "image")
"""Keys of an object in place of an image."""

SIZE_KEYS = tuple(NO_WISH.__dataclass_fields__)
"""Keys of an image part, or of an object in place of an image, that say how large it is to be: qwen_vl_utils'."""

SESSION_KEY = "new_session"
"""Key of an image part, or of an object in place of an image: true where it has nothing to do with the image before."""

_SCHEME = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://")


def read_keys(given: Mapping[Any, Any], keys: tuple[str, ...], rules: KeyRules, level: Level) -> dict[Any, Any]:
    """The mapping after `KeyRules.checked`, with SIZE_KEYS and SESSION_KEY among the keys that are read.

    OpenAI's `detail` has a meaning for its own models only, except that `auto` leaves the size to the model.
    """
    leaves_it = ("detail",) if given.get("detail") == "auto" else ()
    return rules.checked(given, level, (*keys, *SIZE_KEYS, SESSION_KEY, *leaves_it))


def wish_of(*mappings: Mapping[Any, Any]) -> SizeWish:
    """The size stated in a part and in the image object within it. Raises RecordError (bad_size)."""
    stated: dict[str, int] = {}
    for mapping in mappings:
        for key in SIZE_KEYS:
            value = mapping.get(key)
            if value is None:
                continue
            is_whole = isinstance(value, int | float) and not isinstance(value, bool) and value == value // 1
            if not is_whole or not 0 < value < 1e12:
                raise RecordError("bad_size", f"an image's {key} is {value!r:.40}, expected a whole number of pixels")
            if stated.setdefault(key, int(value)) != value:
                raise RecordError("bad_size", f"an image's {key} is both {stated[key]} and {value}")
    try:
        return SizeWish(**stated) if stated else NO_WISH
    except ValueError as error:
        raise RecordError("bad_size", f"an image's size: {error}") from error


def image_of_part(part: Mapping[str, Any], rules: KeyRules = NO_RULES) -> ImageRef | None:
    """The image of a typed part, from the one key that holds it; None for a part that names none.

    Raises RecordError with reason bad_image, remote_image, bad_size or unread_key.
    """
    given = [key for key in IMAGE_KEYS if part.get(key) is not None]
    if len(given) > 1:
        raise RecordError("bad_image", f"an image part has {' and '.join(given)}, expected one of them")
    if not given:
        return None
    value = part[given[0]]
    if given[0] == "base64":
        return ImageRef(_decoded(value, "base64 text"), wish_of(part), _starts_session(part))
    return image_ref(_of_source(value, rules) if given[0] == "source" else value, rules, part)


def image_ref(value: Any, rules: KeyRules = NO_RULES, part: Mapping[str, Any] | None = None) -> ImageRef:
    """A path, data: URL, file: URL, bytes, picture, uint8 array (H, W), (H, W, 3) or (H, W, 4), or a mapping with one.

    Mappings are {"bytes", "path"} of `datasets` and {"url"} of OpenAI; None in them means absent. Nothing is fetched.
    part: what the image stands in, which may state its size.
    Raises RecordError with reason bad_image, remote_image, bad_size or unread_key.
    """
    around = [part or {}]
    while isinstance(value, Mapping) and len(around) < 3:
        around.append(read_keys(value, OBJECT_KEYS, rules, "image"))
        value = _image_of_object(around[-1])
    return ImageRef(_source(value), wish_of(*around), _starts_session(*around))


def _starts_session(*mappings: Mapping[Any, Any]) -> bool:
    """Whether a part, or the image object within it, says so. Raises RecordError (bad_image)."""
    said = [mapping[SESSION_KEY] for mapping in mappings if mapping.get(SESSION_KEY) is not None]
    if wrong := [value for value in said if not isinstance(value, bool)]:
        raise RecordError("bad_image", f"an image's {SESSION_KEY} is {wrong[0]!r:.40}, expected true or false")
    return any(said)


def _source(value: Any) -> str | bytes | Image.Image:
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


def _of_source(value: Any, rules: KeyRules) -> Any:
    """What Anthropic's {"type": "base64", "media_type": ..., "data": ...}, or {"type": "url", "url": ...}, holds."""
    if not isinstance(value, Mapping):
        raise RecordError("bad_image", f"source of an image is {value!r:.60}, expected an object with type and data")
    value = rules.checked(value, "image", ("type", "data", "url"))
    if value.get("type") == "base64" and "url" not in value:
        return _decoded(value.get("data"), "base64 text")
    if value.get("type") == "url" and "data" not in value:
        return value.get("url")
    raise RecordError("bad_image", f"source of an image has type {value.get('type')!r:.40}, expected base64 with data")


def _image_of_object(value: Mapping[str, Any]) -> Any:
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
