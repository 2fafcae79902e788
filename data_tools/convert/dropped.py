"""Why something of a corpus is left out: the reason it is counted under."""

from __future__ import annotations

from collections.abc import Iterable

DROPPED_SUFFIX = ".dropped.jsonl"
"""In place of the suffix of --out: the records left out, one a line, as the trainer's quarantine has them."""


class DropError(ValueError):
    """A record or turn that is left out; the message is the reason it is counted under."""


def check_unicode(texts: Iterable[str]) -> None:
    """Raise DropError for texts that no UTF-8 file can hold: JSON may spell half of a surrogate pair."""
    try:
        for text in texts:
            text.encode()
    except UnicodeEncodeError as error:
        raise DropError("not valid Unicode") from error
