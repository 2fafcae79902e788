"""How much one record may hold: looked at before the work that it would make."""

from __future__ import annotations

from dataclasses import dataclass

from pixelprune.images.image_file import MAX_FILE_BYTES
from pixelprune.records.record import Record, RecordError

__all__ = ["DEFAULT_LIMITS", "RecordLimits"]


@dataclass(frozen=True)
class RecordLimits:
    """max_file_bytes: of an image's file, or of its encoded bytes within a record."""

    max_file_bytes: int = MAX_FILE_BYTES
    max_text_chars: int = 2_000_000
    max_turns: int = 1000
    max_images: int = 256

    def check(self, record: Record) -> None:
        """Raises RecordError (too_large), naming the setting, for a record that holds more."""
        num_chars = sum(len(message.text) + len(message.reasoning) for message in record.messages)
        for count, what, name in (
            (len(record.messages), "turns", "max_turns"),
            (len(record.images), "images", "max_images"),
            (num_chars, "characters", "max_text_chars"),
        ):
            if count > getattr(self, name):
                raise RecordError("too_large", f"{count} {what}, more than data.{name}={getattr(self, name)}")


DEFAULT_LIMITS = RecordLimits()
"""The limits where no others are given."""
