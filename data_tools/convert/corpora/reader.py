"""What the readers of published training corpora share: entries in, records out, everything left out counted."""

from __future__ import annotations

from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Any

from data_tools.convert.benchmarks.reader import BenchmarkReader
from data_tools.convert.dropped import DropError
from data_tools.convert.image_files import ImageFiles


class CorpusReader(BenchmarkReader):
    """Entries -> records of the training format. dropped_parts: elements or answers of entries that are kept."""

    def __init__(self, images: ImageFiles, source: str) -> None:
        super().__init__(images)
        self.source = source
        self.dropped_parts: Counter[str] = Counter()
        self._found: dict[str, str] = {}

    def find_image(self, name: str) -> str:
        """The name that an image has under --images: what is published may begin with folders of another machine.

        The longest end of the path that is a file counts. Raises DropError when there is none.
        """
        if name not in self._found:
            parts = PurePosixPath(name.replace("\\", "/")).parts
            parts = parts[1:] if parts[:1] == ("/",) else parts
            ends = ("/".join(parts[i:]) for i in range(len(parts)))
            found = next((end for end in ends if ".." not in parts and (self.images.folder / end).is_file()), None)
            if found is None:
                raise DropError("image missing")
            self._found[name] = found
        return self._found[name]

    def record_id(self, entry: dict[str, Any], file: Path, number: int) -> str:
        return f"{self.source}-{file.stem}-{number:07d}" if entry.get("id") is None else f"{self.source}-{entry['id']}"
