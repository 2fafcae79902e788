"""ChartQA as published -> evaluation records, scored by relaxed accuracy.

Fields (github.com/vis-nlp/ChartQA, "ChartQA Dataset/test/test_human.json" and test_augmented.json, commit 3dab8e8):
imgname (a file of the folder png), query, label. Entries have no ids of their own: they are named by file and place.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from data_tools.convert.dropped import DropError, check_unicode
from data_tools.convert.image_files import ImageFiles
from data_tools.records import grounding_record

SUBSETS = ("human", "augmented")


class ChartQAReader:
    """Entries -> evaluation records; `dropped` counts what was left out and why.

    The subset, human or augmented, is the one that the file's name says, as both have the same fields.
    """

    def __init__(self, images: ImageFiles) -> None:
        self.images = images
        self.dropped: Counter[str] = Counter()
        self.num_read = 0

    def record(self, entry: Any, file: Path, number: int) -> dict[str, Any] | None:
        """One evaluation record, or None where it was dropped (and counted)."""
        self.num_read += 1
        try:
            return self._record(entry, file, number)
        except DropError as error:
            self.dropped[str(error)] += 1
            return None

    def _record(self, entry: Any, file: Path, number: int) -> dict[str, Any]:
        if not isinstance(entry, dict):
            raise DropError("not a JSON object")
        name, query, label = (entry.get(key) for key in ("imgname", "query", "label"))
        if not isinstance(name, str) or not isinstance(query, str) or not query.strip():
            raise DropError("imgname or query missing")
        if not isinstance(label, str) or not label.strip():
            raise DropError("label is no text")
        width, height = self.images.size(name)
        metadata = {
            "source": "chartqa",
            "subset": subset_of(file),
            "scorer": "relaxed",
            "answers": [label],
            "image_size": [width, height],
        }
        record_id = f"{file.stem}-{number:05d}"
        record = grounding_record(record_id, self.images.relative(name), query.strip(), label, metadata)
        check_unicode([json.dumps(record, ensure_ascii=False)])
        return record


def subset_of(file: Path) -> str:
    """human or augmented. Raises ValueError for a file that is named for neither."""
    named = [subset for subset in SUBSETS if subset in file.stem]
    if len(named) != 1:
        raise ValueError(f"{file}: expected a file named for one of {', '.join(SUBSETS)}, as test_human.json")
    return named[0]
