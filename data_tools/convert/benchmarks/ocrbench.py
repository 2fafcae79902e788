"""OCRBench as published -> evaluation records, scored by containment.

Fields (github.com/Yuliang-Liu/MultimodalOCR, OCRBench/OCRBench/OCRBench.json, commit 794c36d): image_path (below the
folder OCRBench_Images), question, answers (a text or a list of texts), type, dataset_name, id. Columns of the hub's
Parquet (github.com/EvolvingLMMs-Lab/lmms-eval, lmms_eval/tasks/ocrbench/utils.py, commit 46a88d8): image, question,
answer, question_type, dataset.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_tools.convert.benchmarks.reader import BenchmarkReader, text_of, texts_of
from data_tools.records import question_record

FORMULAS = "HME100k"
"""The data set whose answers are compared without spaces, case counting (OCRBench/example.py, the same commit)."""


class OCRBenchReader(BenchmarkReader):
    """The published score is a mean over all questions, so that the type of question is a kind and no subset."""

    hub_names = {  # noqa: RUF012
        "image": "image_path",
        "answer": "answers",
        "question_type": "type",
        "dataset": "dataset_name",
    }

    def make(self, entry: dict[str, Any], file: Path, number: int) -> dict[str, Any]:
        name, question = text_of(entry, "image_path"), text_of(entry, "question")
        answers, dataset = texts_of(entry, "answers"), text_of(entry, "dataset_name")
        self.images.size(name)
        metadata = {
            "source": "ocrbench",
            "scorer": "contains_formula" if dataset == FORMULAS else "contains",
            "answers": answers,
            "element": text_of(entry, "type"),
            "dataset": dataset,
        }
        # The published ids repeat from one data set to the next.
        record_id = f"{dataset}-{entry['id']}" if "id" in entry else f"{file.stem}-{number:05d}"
        return question_record(record_id, [self.images.relative(name)], question, answers[0], metadata)
