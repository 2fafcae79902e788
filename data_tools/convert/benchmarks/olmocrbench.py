"""olmOCR-Bench as published -> a record per page; its own scorer reads the answers as Markdown files.

Fields (github.com/allenai/olmocr, olmocr/bench/tests.py, commit dc802aa): pdf (a path below bench_data/pdfs), page
(from 1), id, type, and what the test asks. Several tests stand on one page, which is asked for once. Its scorer
(olmocr/bench/benchmark.py) wants PDF_pgPAGE_repeat1.md for every page, which is what a record's id says.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from data_tools.convert.benchmarks.pages import PageImages
from data_tools.convert.benchmarks.reader import BenchmarkReader, text_of
from data_tools.convert.dropped import DropError
from data_tools.convert.image_files import ImageFiles
from data_tools.records import question_record, read_jsonl
from pixelprune.files import write_whole

PROMPT = (
    "Please provide a natural, plain text representation of the document, formatted in Markdown. Skip any headers and "
    "footers. For ALL mathematical expressions, use LaTeX notation with \\( and \\) for inline equations and \\[ and "
    "\\] for display equations. Convert any tables into Markdown format."
)
"""The benchmark's own (olmocr/bench/prompts.py, build_basic_prompt)."""


class OlmOCRBenchReader(BenchmarkReader):
    """Tests on a page that has its record already are counted as such, since all are scored on one answer."""

    def __init__(self, images: ImageFiles) -> None:
        super().__init__(images)
        self._pages = PageImages(images.folder)
        self._asked: set[str] = set()

    def make(self, entry: dict[str, Any], file: Path, number: int) -> dict[str, Any]:
        """Raises DropError for pages without an image, and for pages asked for already."""
        pdf, page = text_of(entry, "pdf"), entry.get("page")
        if type(page) is not int or page < 1:
            raise DropError("page is no number from 1")
        document = pdf.removesuffix(".pdf")
        record_id = f"{document}_pg{page}_repeat1"
        if record_id in self._asked:
            raise DropError("another test on a page that is asked for already")
        pages = self._pages.pages(document)
        if page not in pages:
            raise DropError("no page images")
        self.images.size(pages[page])
        self._asked.add(record_id)
        metadata = {"source": "olmocrbench", "scorer": "predictions", "element": file.stem, "pdf": pdf, "page": page}
        image = self.images.relative(pages[page])
        return question_record(record_id, [image], PROMPT, None, metadata)


def write_answers(predictions: Path, folder: Path) -> int:
    """predictions.jsonl of an evaluation -> Markdown files for the benchmark's scorer. Returns how many were written.

    A failed answer is an empty file, which fails its tests. Raises ValueError for ids that are no page's, and where the
    folder exists.
    """
    if folder.exists():
        raise ValueError(f"--out {folder} exists already: the scorer would read its files as answers, too")
    rows = list(read_jsonl(predictions))
    for row in rows:
        name, text = row.get("source_id"), row.get("text")
        is_page = isinstance(name, str) and name.endswith("_repeat1") and isinstance(text, str)
        if not is_page or ".." in Path(str(name)).parts or Path(str(name)).is_absolute():
            raise ValueError(f"{predictions}: expected the answers to olmocrbench records, got id {json.dumps(name)}")
        target = folder / f"{name}.md"
        target.parent.mkdir(parents=True, exist_ok=True)
        write_whole(target, str(text).encode())
    return len(rows)
