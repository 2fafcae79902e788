"""ChartQA as published -> evaluation records, scored by relaxed accuracy.

Fields (github.com/vis-nlp/ChartQA, "ChartQA Dataset/test/test_human.json" and test_augmented.json, commit 3dab8e8):
imgname (a file of the folder png), query, label. Entries have no ids of their own: they are named by file and place.
Columns of the hub's Parquet (github.com/EvolvingLMMs-Lab/lmms-eval, lmms_eval/tasks/chartqa/utils.py, commit 2bb5e98):
image, question, answer, type (human_test, augmented_test).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_tools.convert.benchmarks.reader import BenchmarkReader, text_of
from data_tools.convert.dropped import DropError
from data_tools.records import question_record

SUBSETS = ("human", "augmented")


class ChartQAReader(BenchmarkReader):
    """The subset, human or augmented, is the one that the file's name says, as both have the same fields; a row of
    Parquet says its own."""

    hub_names = {"image": "imgname", "question": "query", "answer": "label"}  # noqa: RUF012

    def make(self, entry: dict[str, Any], file: Path, number: int) -> dict[str, Any]:
        """Raises ValueError for a file that is named for no subset, where the entry says none."""
        label = entry.get("label")
        name, query = text_of(entry, "imgname"), text_of(entry, "query")
        if not isinstance(label, str) or not label.strip():
            raise DropError("label is no text")
        width, height = self.images.size(name)
        metadata = {
            "source": "chartqa",
            "subset": subset_of(text_of(entry, "type") if "type" in entry else file.stem, file),
            "scorer": "relaxed",
            "answers": [label],
            "image_size": [width, height],
        }
        record_id = f"{file.stem}-{number:05d}"
        return question_record(record_id, [self.images.relative(name)], query, label, metadata)


def subset_of(name: str, file: Path) -> str:
    """human or augmented, as in test_human or human_test. Raises ValueError for what names neither."""
    named = [subset for subset in SUBSETS if subset in name]
    if len(named) != 1:
        raise ValueError(f"{file}: expected a file named for one of {', '.join(SUBSETS)}, as test_human.json")
    return named[0]
