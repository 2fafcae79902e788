"""Multiple-choice benchmarks in the TSV shape of OpenCompass -> evaluation records, scored by the option's letter.

Fields (github.com/open-compass/VLMEvalKit, vlmeval/dataset/image_mcq.py, commit 01424f9, and image_base.py, commit
0507265): index, question, A, B, C, ..., answer (a letter), hint, category, l2-category, split, and image: base64 of a
picture, a list of such, or the index of the row that has the picture. In this shape are published: MMBench, MMMU,
MMStar, RealWorldQA, AI2D, HR-Bench and V* (VStarBench.tsv). Parquet with the same columns, as the hub has MMBench and
HR-Bench (github.com/EvolvingLMMs-Lab/lmms-eval, lmms_eval/tasks/mmbench/en_utils.py and hrbench/utils.py, commit
161c7a1), is read alike.
"""

from __future__ import annotations

import ast
import base64
import binascii
import csv
import io
import re
import string
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_tools.convert.benchmarks.hub_tables import IMAGE, SUFFIX, hub_rows
from data_tools.convert.benchmarks.reader import BenchmarkReader, text_of
from data_tools.convert.dropped import DropError
from data_tools.convert.image_files import ImageFiles
from data_tools.records import question_record

CIRCLE = 1_000_000
"""MMBench asks a question again with its options turned: rows whose indices are equal modulo this are one question,
which counts as right when every one of them is (CircularEval; vlmeval/dataset/utils/multiple_choice.py)."""
_MAX_REFERENCE_LEN = 64
_LOWER = {"L2-category": "l2-category"}
_PLAIN = re.compile(r"[A-Za-z0-9][\w.-]{0,99}", re.ASCII)


class TsvReader(BenchmarkReader):
    """The published scores are means over all rows, or over circles in MMBench: categories are kinds and no subsets.

    A file is a benchmark, named as it is in small letters, and so is each split within it. Pictures are written to a
    folder of that name in images.folder, as the bytes they are.
    """

    def __init__(self, images: ImageFiles) -> None:
        super().__init__(images)
        self._pictures: dict[str, list[str]] = {}

    def entries(self, path: Path) -> Iterator[tuple[Any, int]]:
        """Rows without their pictures, which a pass before this has written. Raises ValueError for another shape."""
        self._pictures = {}
        for row, _ in _rows(path):
            cell = row.get("image") or ""
            if len(cell) > _MAX_REFERENCE_LEN:
                self._pictures[row["index"]] = self._written(cell, path, row["index"])
        yield from _rows(path)

    def _written(self, cell: str, path: Path, index: str) -> list[str]:
        """Pictures of a cell as files, by their names below the image folder; one that is no picture has no name."""
        names = []
        for number, encoded in enumerate(_listed(cell)):
            try:
                data = base64.b64decode(encoded, validate=True)
                if not _PLAIN.fullmatch(index) or not _PLAIN.fullmatch(path.stem):
                    return []
                names.append(self.images.add(f"{path.stem}/{index}-{number}", data))
            except (binascii.Error, DropError, ValueError):
                return []
        return names

    def make(self, entry: dict[str, Any], file: Path, number: int) -> dict[str, Any]:
        """Rows without an answer, such as a test split's, are dropped, counted."""
        names = self._images_of(entry)
        for name in names:
            self.images.size(name)
        options = _options(entry)
        answer = text_of(entry, "answer")
        if options and answer not in options:
            raise DropError("answer is no letter of its options")
        split, category = (entry.get(key) or "" for key in ("split", "category"))
        benchmark = file.stem.lower()
        metadata: dict[str, Any] = {
            "source": f"{benchmark}-{split}" if split else benchmark,
            "scorer": "option" if options else "exact",
            "answers": [answer],
        }
        if options:
            metadata["options"] = list(options.values())
        if category:
            metadata["element"] = category
        if entry.get("l2-category"):
            metadata["l2_category"] = entry["l2-category"]
        index = text_of(entry, "index")
        if benchmark.startswith("mmbench"):
            if not index.isdecimal():
                raise DropError("index is no number")
            metadata["all_of"] = str(int(index) % CIRCLE)
        paths = [self.images.relative(name) for name in names]
        return question_record(index, paths, _question(entry, options), answer, metadata)

    def _images_of(self, entry: dict[str, Any]) -> list[str]:
        cell, index = entry.get("image") or "", entry["index"]
        if not cell:
            return [text_of(entry, "image_path")]
        names = self._pictures.get(index if len(cell) > _MAX_REFERENCE_LEN else cell)
        if not names:
            raise DropError("image is no picture" if len(cell) > _MAX_REFERENCE_LEN else "image of another row missing")
        return names


def _options(entry: dict[str, Any]) -> dict[str, str]:
    """Letter -> option, empty where the row is an open question. Raises DropError for a gap between letters."""
    letters = string.ascii_uppercase
    options = {letter: entry[letter].strip() for letter in letters if (entry.get(letter) or "").strip()}
    if list(options) != list(letters[: len(options)]) or len(options) == 1:
        raise DropError("options are not A, B, ... without a gap")
    return options


def _question(entry: dict[str, Any], options: dict[str, str]) -> str:
    hint = (entry.get("hint") or "").strip()
    lines = [f"Hint: {hint}"] if hint else []
    lines.append(text_of(entry, "question"))
    if options:
        lines += ["Options:", *(f"{letter}. {option}" for letter, option in options.items())]
    return "\n".join(lines)


def _listed(cell: str) -> list[str]:
    """The texts of a Python list, or the cell itself."""
    if not cell.startswith("["):
        return [cell]
    try:
        value = ast.literal_eval(cell)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return [cell]
    return [text for text in value if isinstance(text, str)] if isinstance(value, list) else [cell]


def _rows(path: Path) -> Iterator[tuple[dict[str, str], int]]:
    yield from _hub_rows(path) if path.suffix.lower() == SUFFIX else _tsv_rows(path)


def _hub_rows(path: Path) -> Iterator[tuple[dict[str, str], int]]:
    """The hub's copies have the same columns, pictures as bytes and empty cells as none, or as the text nan."""
    for row, position in hub_rows(path):
        missing = [name for name in ("index", "question", "answer") if name not in row]
        if missing:
            raise ValueError(f"{path}: expected the columns of OpenCompass's TSV, got none called {', '.join(missing)}")
        picture = row.get(IMAGE)
        if isinstance(picture, dict):
            data = picture.get("bytes")
            row[IMAGE] = base64.b64encode(data).decode() if isinstance(data, bytes) else picture.get("path")
        cells = {_LOWER.get(key, key): value for key, value in row.items()}
        yield {key: "" if value in (None, "nan") else str(value) for key, value in cells.items()}, position


def _tsv_rows(path: Path) -> Iterator[tuple[dict[str, str], int]]:
    csv.field_size_limit(sys.maxsize)  # a picture is one field
    with path.open("rb") as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t", restval="")
        names = reader.fieldnames or ()
        missing = [name for name in ("index", "question", "answer") if name not in names]
        if missing:
            raise ValueError(f"{path}: expected tab-separated columns, got none called {', '.join(missing)}")
        try:
            for row in reader:
                yield row, raw.tell()
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{path}, line {reader.line_num}: not tab-separated UTF-8: {error}") from error
