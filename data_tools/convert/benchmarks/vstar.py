"""V* as its authors publish it -> evaluation records, scored by the option's letter.

Fields of test_questions.jsonl of craigwu/vstar_bench, and columns of the hub's Parquet with the picture in it
(github.com/EvolvingLMMs-Lab/lmms-eval, lmms_eval/tasks/vstar_bench/utils.py, commit 48abd2d): image
("direct_attributes/NAME.jpg"), text (the question, its options as lines "(A) ..." and a sentence that asks for the
letter), category (direct_attributes, relative_position), question_id, label (a letter). OpenCompass's VStarBench.tsv is
read by `mcq`.
"""

from __future__ import annotations

import re
import string
from pathlib import Path
from typing import Any

from data_tools.convert.benchmarks.reader import BenchmarkReader, text_of
from data_tools.convert.dropped import DropError
from data_tools.records import question_record

_OPTION = re.compile(r"\(([A-Z])\)\s*(\S.*)")
_ASKS = "answer with the option"
"""How the sentence behind the options begins; prompt presets say that."""


class VStarReader(BenchmarkReader):
    """The published score is a mean over all questions, so that the category is a kind and no subset."""

    def make(self, entry: dict[str, Any], file: Path, number: int) -> dict[str, Any]:
        name, label = text_of(entry, "image"), text_of(entry, "label")
        question, options = parted(text_of(entry, "text"))
        if label not in list(string.ascii_uppercase[: len(options)]):
            raise DropError("label is no letter of its options")
        self.images.size(name)
        metadata = {
            "source": "vstar",
            "scorer": "option",
            "answers": [label],
            "options": options,
            "element": text_of(entry, "category"),
        }
        lines = [question, "Options:", *(f"{a}. {o}" for a, o in zip(string.ascii_uppercase, options, strict=False))]
        record_id = str(entry.get("question_id", f"{file.stem}-{number:05d}"))
        return question_record(record_id, [self.images.relative(name)], "\n".join(lines), label, metadata)


def parted(text: str) -> tuple[str, list[str]]:
    """The question and its options. Raises DropError for options that are not lines (A), (B), ... without a gap."""
    asked: list[str] = []
    options: list[str] = []
    for line in filter(None, map(str.strip, text.splitlines())):
        if option := _OPTION.fullmatch(line):
            if option[1] != string.ascii_uppercase[len(options)]:
                raise DropError("options are not lines (A), (B), ... without a gap")
            options.append(option[2])
        elif not options:
            asked.append(line)
        elif not line.lower().startswith(_ASKS):
            raise DropError("text behind the options")
    if len(options) < 2 or not asked:
        raise DropError("options are not lines (A), (B), ... without a gap")
    return "\n".join(asked), options
