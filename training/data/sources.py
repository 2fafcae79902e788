"""Data sets as random-access rows: JSON lines, JSON arrays, Parquet, folders written by `datasets`, hub ids.

Parquet, Arrow and the hub go through the `datasets` library. Its JSON reader does not fit here: it unifies the types of
all rows, so a file that mixes formats fails as a whole, and so does a file with one damaged line. JSON is therefore
read in place: the byte range of every record is found once, and a record is parsed when it is asked for.
"""

from __future__ import annotations

import json
import mmap
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pixelprune.records.record import RecordError
from training.data.settings import SourceSettings

SCAN_BYTES = 1 << 26
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")


class JsonRows:
    """Records of one .jsonl or .json file, found by their byte ranges. Picklable: a worker maps the file again."""

    def __init__(self, path: Path):
        self.path = path
        self.spans = _array_spans(path) if _is_json_array(path) else _line_spans(path)
        self._bytes: mmap.mmap | None = None

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, row: int) -> Any:
        """The parsed record. Raises RecordError (invalid_json)."""
        if self._bytes is None:
            with self.path.open("rb") as file:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        start, end = self.spans[row]
        try:
            return json.loads(self._bytes[start:end])
        except (ValueError, RecursionError) as error:
            raise RecordError("invalid_json", f"not valid JSON: {error}") from error

    def where(self, row: int) -> str:
        return f"{self.path}, record {row + 1}"

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_bytes": None}


class ArrowRows:
    """Rows of a `datasets.Dataset`, read as Arrow so that images stay encoded until a worker decodes them."""

    def __init__(self, dataset, origin: str):
        self.dataset = dataset.with_format("arrow")
        self.origin = origin

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> Any:
        return self.dataset[int(row)].to_pylist()[0]

    def where(self, row: int) -> str:
        return f"{self.origin}, row {row}"


class ChainedRows:
    """Several files read as one source, in name order."""

    def __init__(self, parts: Sequence[JsonRows]):
        self.parts = list(parts)
        self.starts = np.concatenate([[0], np.cumsum([len(part) for part in parts])])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def _find(self, row: int) -> tuple[JsonRows, int]:
        part = int(np.searchsorted(self.starts, row, side="right")) - 1
        return self.parts[part], int(row - self.starts[part])

    def __getitem__(self, row: int) -> Any:
        part, inner = self._find(row)
        return part[inner]

    def where(self, row: int) -> str:
        part, inner = self._find(row)
        return part.where(inner)


class Source:
    """One opened data set: rows, the folder its image paths are relative to, and a fingerprint of its content."""

    def __init__(self, settings: SourceSettings, rows: JsonRows | ArrowRows | ChainedRows, fingerprint: str):
        self.settings = settings
        self.rows = rows
        self.fingerprint = fingerprint
        self.name = settings.name or Path(settings.path).stem
        path = Path(settings.path)
        folder = path if path.is_dir() else path.parent if path.exists() else None
        self.root = Path(settings.root) if settings.root else folder

    def __len__(self) -> int:
        return len(self.rows)

    def record_id(self, row: int) -> str:
        return f"{self.name}:{row}"


def open_sources(settings: Sequence[SourceSettings]) -> list[Source]:
    """Open every source. Raises ValueError when a name is used twice or there is none at all."""
    if not settings:
        raise ValueError("no data: the recipe names no source (data.sources)")
    sources = [open_source(source) for source in settings]
    names = [source.name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two sources are called {name!r}; give them different names (sources[].name)")
    return sources


def open_source(settings: SourceSettings) -> Source:
    """Open one data set.

    Raises ValueError when the path is neither data nor a hub id, when the source is empty, or for a bad root or weight.
    """
    if not 0 <= settings.weight < 1e6:
        raise ValueError(f"source {settings.path}: weight {settings.weight}, expected 0 to 1e6 (sources[].weight)")
    if settings.root and not Path(settings.root).is_dir():
        raise ValueError(f"source {settings.path}: root {settings.root} is not a folder (sources[].root)")
    path = Path(settings.path)
    if path.is_file():
        source = _open_files(settings, [path])
    elif path.is_dir():
        source = _open_folder(settings, path)
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", settings.path) and not path.suffix:
        import datasets

        dataset = datasets.load_dataset(settings.path, split=settings.split)
        source = Source(settings, ArrowRows(dataset, settings.path), dataset._fingerprint)
    else:
        raise ValueError(f"source {settings.path}: no such file or folder (sources[].path)")
    if len(source) == 0:
        raise ValueError(f"source {settings.path} holds no records (sources[].path)")
    return source


def _open_folder(settings: SourceSettings, folder: Path) -> Source:
    if (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():
        import datasets

        dataset = datasets.load_from_disk(str(folder))
        if isinstance(dataset, datasets.DatasetDict):
            if settings.split not in dataset:
                raise ValueError(
                    f"source {folder}: no split {settings.split!r}, it has {list(dataset)} (sources[].split)"
                )
            dataset = dataset[settings.split]
        return Source(settings, ArrowRows(dataset, str(folder)), dataset._fingerprint)
    files = sorted(path for path in folder.iterdir() if path.is_file() and _is_data(path))
    kinds = sorted({path.suffix.lower() for path in files})
    if not files:
        raise ValueError(
            f"source {folder}: no .parquet, .jsonl, .ndjson, .json or saved data set in this folder (sources[].path)"
        )
    if ".parquet" in kinds and len(kinds) > 1:
        raise ValueError(
            f"source {folder}: holds {' and '.join(kinds)} files, expected Parquet or JSON alone; "
            "give one of the files, or keep them in folders of their own (sources[].path)"
        )
    return _open_files(settings, files)


def _is_data(path: Path) -> bool:
    # data_tools writes beside the records: report.json, NAME.report.json, NAME.dropped.jsonl.
    is_report = path.name == "report.json" or path.name.endswith((".report.json", ".dropped.jsonl"))
    return path.suffix.lower() in (".parquet", *JSON_SUFFIXES) and not is_report


def _open_files(settings: SourceSettings, files: list[Path]) -> Source:
    suffix = files[0].suffix.lower()
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    if suffix == ".parquet":
        import datasets

        dataset = datasets.Dataset.from_parquet([str(file) for file in files])
        return Source(settings, ArrowRows(dataset, settings.path), repr(stats))
    if suffix not in JSON_SUFFIXES:
        raise ValueError(
            f"source {settings.path}: {suffix or 'no'} suffix, expected .jsonl, .ndjson, .json or .parquet"
        )
    parts = [JsonRows(file) for file in files if file.stat().st_size]
    return Source(settings, parts[0] if len(parts) == 1 else ChainedRows(parts), repr(stats))


def _is_json_array(path: Path) -> bool:
    """A .json file may hold one array or, as many do, one record per line."""
    with path.open("rb") as file:
        return path.suffix.lower() == ".json" and file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")


def _line_spans(path: Path) -> np.ndarray:
    """Byte ranges int64 (n, 2) of the lines that are not blank."""
    ends = []
    with path.open("rb") as file:
        offset = 0
        while chunk := file.read(SCAN_BYTES):
            ends.append(np.flatnonzero(np.frombuffer(chunk, dtype=np.uint8) == 10) + offset)
            offset += len(chunk)
        ends.append(np.array([offset], dtype=np.int64))
        stops = np.concatenate(ends)
        starts = np.concatenate([[0], stops[:-1] + 1])
        # Only a line too short to hold a record can be blank; longer ones are parsed and judged later.
        long_enough = stops - starts > 2
        for i in np.flatnonzero(~long_enough & (stops > starts)):
            file.seek(starts[i])
            long_enough[i] = bool(file.read(stops[i] - starts[i]).strip())
    return np.stack([starts, stops], axis=1)[long_enough]


def _array_spans(path: Path) -> np.ndarray:
    """Byte ranges int64 (n, 2) of the elements of the JSON array in the file. Raises ValueError if it is damaged."""
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"source {path}: not UTF-8 text ({error}) (sources[].path)") from error
    decode, space = json.JSONDecoder().raw_decode, re.compile(r"\s*")
    spans: list[tuple[int, int]] = []
    place = space.match(text, text.index("[") + 1).end()  # type: ignore[union-attr]
    at, at_byte = 0, 3 if data.startswith(b"\xef\xbb\xbf") else 0
    try:
        while text[place] != "]":
            _, end = decode(text, place)
            start_byte = at_byte + len(text[at:place].encode())
            at, at_byte = end, start_byte + len(text[place:end].encode())
            spans.append((start_byte, at_byte))
            place = space.match(text, end).end()  # type: ignore[union-attr]
            if text[place] == ",":
                place = space.match(text, place + 1).end()  # type: ignore[union-attr]
            elif text[place] != "]":
                raise ValueError(f"expected ',' or ']' at character {place}")
    except (ValueError, IndexError, RecursionError) as error:
        raise ValueError(
            f"source {path}: the JSON array is damaged after {len(spans)} records ({error}); "
            "one record per line (.jsonl) would lose only the damaged one"
        ) from error
    return np.array(spans, dtype=np.int64).reshape(-1, 2)
