"""Where images stand in a text: <image> takes the next of the record's list, <img>NAME</img> names its own."""

from __future__ import annotations

import re
from collections.abc import Iterator

__all__ = ["image_marks"]

_MARK, _TAKES_NEXT = re.compile("<image>|<img>"), re.compile("<image>")


def image_marks(text: str) -> Iterator[tuple[int, int, str | None]]:
    """(start, end, None) of each <image> and (start, end, name) of each <img>name</img>, in order.

    An <img> that nothing closes is text. Linear in the text's length: every stretch of it is searched once.
    """
    mark = _MARK.search(text)
    while mark:
        start, end, name = mark.start(), mark.end(), None
        if mark.group() == "<img>":
            close = text.find("</img>", end)
            if close < 0:  # nor is any later one closed
                yield from ((found.start(), found.end(), None) for found in _TAKES_NEXT.finditer(text, end))
                return
            name, end = text[end:close], close + len("</img>")
        yield start, end, name
        mark = _MARK.search(text, end)
