"""DocVQA and InfoVQA as published -> evaluation records, scored by ANLS.

Fields of DocVQA (val_v1.0.json and val_v1.0_withQT.json of the challenge, rrc.cvc.uab.es, ch=17, as
github.com/tiennvcs/docvqa, libs/layoutlmv2/README.md, commit d5d4331, shows them): an object whose `data` holds
questionId, question, image ("documents/NAME.png"), answers, docId, and question_types in the second file. Fields of
InfoVQA (the same page, infographicsVQA_val_v1.0_withQT.json; github.com/google-research/pix2struct,
pix2struct/preprocessing/convert_docvqa.py, commit 42e2427, reads both): questionId, question, image_local_name,
answers, answer_type. The hub's Parquet has the same columns and the picture (github.com/EvolvingLMMs-Lab/lmms-eval,
lmms_eval/tasks/docvqa/utils.py, commit 008ddc8, and infovqa/utils.py, commit 2bb5e98).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_tools.convert.benchmarks.hub_tables import SUFFIX
from data_tools.convert.benchmarks.reader import BenchmarkReader, text_of, texts_of
from data_tools.convert.image_files import ImageFiles
from data_tools.records import question_record

IMAGE_KEYS = {"docvqa": "image", "infovqa": "image_local_name"}
_KIND_KEYS = ("question_types", "answer_type")


class DocumentReader(BenchmarkReader):
    """benchmark: docvqa or infovqa. A record's id is its questionId; its kinds of question are kept as `types`."""

    def __init__(self, images: ImageFiles, benchmark: str) -> None:
        super().__init__(images)
        self.benchmark = benchmark
        self.hub_names = {"image": IMAGE_KEYS[benchmark]}

    def entries(self, path: Path) -> Iterator[tuple[Any, int]]:
        """The entries of `data`. Raises ValueError for a file of another shape."""
        if path.suffix.lower() == SUFFIX:
            yield from super().entries(path)
            return
        try:
            content = json.loads(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{path}: expected one JSON object with the key 'data', got no JSON: {error}") from error
        entries = content.get("data") if isinstance(content, dict) else None
        if not isinstance(entries, list):
            raise ValueError(f"{path}: expected one JSON object whose 'data' is a list, as the challenge publishes it")
        size = path.stat().st_size
        for number, entry in enumerate(entries, start=1):
            yield entry, size * number // len(entries)

    def make(self, entry: dict[str, Any], file: Path, number: int) -> dict[str, Any]:
        """Questions of a test split have no answers and are dropped, counted."""
        name = text_of(entry, IMAGE_KEYS[self.benchmark])
        question, answers = text_of(entry, "question"), texts_of(entry, "answers")
        self.images.size(name)
        types = next((entry[key] for key in _KIND_KEYS if entry.get(key)), None)
        metadata = {"source": self.benchmark, "scorer": "anls", "answers": answers}
        if types:
            metadata["types"] = types
        record_id = str(entry.get("questionId", f"{file.stem}-{number:05d}"))
        return question_record(record_id, [self.images.relative(name)], question, answers[0], metadata)
