"""A turn as a training record has it: what every converter writes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from data_tools.convert.dropped import DropError
from pixelprune.records.record import ImageRef, Message


def written_turn(message: Message, path_of: Callable[[ImageRef], str]) -> dict[str, Any]:
    """The turn of a message; path_of: where the record names an image. An answer counts unless it says otherwise."""
    content = [
        {"type": "image", "image": path_of(part), **part.wish.stated}
        if isinstance(part, ImageRef)
        else {"type": "text", "text": part}
        for part in message.parts
    ]
    loss: dict[str, Any] = {}
    if message.role == "assistant" and message.weight != 1:
        loss = {"loss_weight": message.weight} if message.supervised else {"loss": False}
    return {"role": message.role, "content": content, **message.template_fields, **loss}


def file_name(image: ImageRef) -> str:
    """The file that an image is in. Raises DropError for inline data."""
    if not isinstance(image.source, str):
        raise DropError("an image is inline data, not a file")
    return image.source
