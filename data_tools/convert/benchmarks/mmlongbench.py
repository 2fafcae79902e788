"""MMLongBench-Doc as published -> records with all pages of their document; its own scorer reads the predictions.

Fields (github.com/mayubo2333/MMLongBench-Doc, data/samples.json, commit d73f0dc): doc_id (a PDF's name), doc_type,
question, answer, answer_format, evidence_pages, evidence_sources. run_api.py of that commit shows the first 120 pages,
drawn at 144 dpi, to every question; scoring takes another model that reads the answer out of the text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_tools.convert.benchmarks.pages import PageImages
from data_tools.convert.benchmarks.reader import BenchmarkReader, text_of
from data_tools.convert.image_files import ImageFiles
from data_tools.records import question_record

_KEPT = ("answer_format", "evidence_pages", "evidence_sources", "doc_id")


class MMLongBenchReader(BenchmarkReader):
    """max_pages: no more than the first so many, as the published script; 0 takes all. Cut records say so."""

    def __init__(self, images: ImageFiles, *, max_pages: int = 0) -> None:
        super().__init__(images)
        self.max_pages = max_pages
        self._pages = PageImages(images.folder)

    def make(self, entry: dict[str, Any], file: Path, number: int) -> dict[str, Any]:
        """Entries have no ids of their own: they are named by file and place."""
        document, question = text_of(entry, "doc_id"), text_of(entry, "question")
        answer = text_of(entry, "answer")
        pages = list(self._pages.pages(document.removesuffix(".pdf")).values())
        shown = pages[: self.max_pages] if self.max_pages else pages
        for name in shown:
            self.images.size(name)
        metadata = {
            "source": "mmlongbench-doc",
            "scorer": "predictions",
            "answers": [answer],
            "element": text_of(entry, "doc_type"),
            "num_pages": len(pages),
            "num_pages_shown": len(shown),
            **{key: entry[key] for key in _KEPT if key in entry},
        }
        images = [self.images.relative(name) for name in shown]
        return question_record(f"{file.stem}-{number:05d}", images, question, answer, metadata)
