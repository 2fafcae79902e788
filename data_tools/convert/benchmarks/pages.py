"""Images of a document's pages, found by the names that PDF renderers give them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from data_tools.convert.dropped import DropError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_NUMBERED = re.compile(r"(.+)[-_](?:pg)?(\d{1,5})")


class PageImages:
    """Pages below a folder, by document: `DOC_3.png` and `DOC-003.png` are the third page of DOC, whatever the zeros.

    The published scripts write the first form, pdftoppm the second. Folders count as part of a document's name.
    """

    def __init__(self, folder: Path) -> None:
        self._pages: dict[str, dict[int, str]] = {}
        for path in sorted(folder.rglob("*")):
            match = _NUMBERED.fullmatch(path.stem)
            if match is None or path.suffix.lower() not in SUFFIXES:
                continue
            name = path.relative_to(folder).as_posix()
            document = path.parent.relative_to(folder) / match.group(1)
            pages = self._pages.setdefault(document.as_posix(), {})
            number = int(match.group(2))
            if number in pages:
                raise ValueError(f"--images: {pages[number]} and {name} are both page {number} of {document}")
            pages[number] = name

    def pages(self, document: str) -> Mapping[int, str]:
        """Number from 1 -> image, all pages of a document. Raises DropError where one between them is missing."""
        pages = self._pages.get(document, {})
        if not pages:
            raise DropError("no page images")
        if sorted(pages) != list(range(1, len(pages) + 1)):
            raise DropError("a page image is missing")
        return dict(sorted(pages.items()))
