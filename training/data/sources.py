"""Data sets as random-access rows: JSON, CSV, Arrow, Parquet, tar shards, folders of them, saved data sets, the hub.

Parquet and the hub go through the `datasets` library. Its JSON reader does not fit here: it unifies the types of all
rows, so a file that mixes formats fails as a whole, and so does a file with one damaged line. JSON and CSV are
therefore read in place (training/data/files): the byte range of every record is found once, and a record is parsed when
it is asked for. A compressed file is unpacked for that, beside its index.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from pixelprune.files import path_meant
from pixelprune.records.prepare import PreparedRecord, Preparer
from training.data.files.address import is_remote
from training.data.files.csv_rows import CsvRows
from training.data.files.json_rows import JsonRows
from training.data.files.layout import chosen_files, files_of_folder, kind_of, stem_of, why_unread
from training.data.files.remote import RemoteFolder, list_remote
from training.data.files.table_rows import ArrowFileRows, ArrowRows
from training.data.files.tar_rows import TarRows
from training.data.files.unpacked import COMPRESSIONS, home_of_index, side_folder, unpacked
from training.data.settings import SourceSettings

HUB = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)")
"""A data set of the hub, as the hub's own file system names it: a path that looks like OWNER/NAME is a path, and one
that does not exist is a typo, which no network is asked about."""
TextRows = JsonRows | CsvRows
PartRows = TextRows | TarRows


class ChainedRows:
    """Several files read as one source, in name order."""

    def __init__(self, parts: Sequence[PartRows]):
        self.parts = list(parts)
        self.starts = np.concatenate([[0], np.cumsum([len(part) for part in parts])])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def _find(self, row: int) -> tuple[PartRows, int]:
        part = int(np.searchsorted(self.starts, row, side="right")) - 1
        return self.parts[part], int(row - self.starts[part])

    def __getitem__(self, row: int) -> object:
        part, inner = self._find(row)
        return part[inner]

    def where(self, row: int) -> str:
        part, inner = self._find(row)
        return part.where(inner)


Rows = PartRows | ArrowRows | ArrowFileRows | ChainedRows


class Source:
    """One opened data set: rows, the folder its image paths are relative to, and a fingerprint of its content."""

    def __init__(self, settings: SourceSettings, rows: Rows, fingerprint: str):
        self.settings = settings
        self.rows = rows
        self.fingerprint = fingerprint
        path = Path(settings.path)
        self.name = settings.name or stem_of(path)
        self.root: Path | RemoteFolder | None = _root_of(settings)

    def __len__(self) -> int:
        return len(self.rows)

    def record_id(self, row: int) -> str:
        return f"{self.name}:{row}"

    def prepared(self, row: int, preparer: Preparer) -> PreparedRecord:
        """One record as this source says that it is read. Raises as `Preparer.prepare` does."""
        return preparer.prepare(
            self.rows[row],
            self.root,
            record_format=self.settings.format,
            preset=self.settings.preset(),
            record_id=self.record_id(row),
        )


def open_sources(settings: Sequence[SourceSettings], index_dir: str = "") -> list[Source]:
    """Open every source. index_dir: as `data.index_dir`, where compressed files are unpacked, too.

    Raises ValueError when a name is used twice or there is none at all, and as `open_source`.
    """
    if not settings:
        raise ValueError("no data: the recipe names no source (data.sources)")
    sources = [open_source(source, index_dir) for source in settings]
    names = [source.name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two sources are called {name!r}; give them different names (sources[].name)")
    return sources


def open_source(settings: SourceSettings, index_dir: str = "") -> Source:
    """Open one data set.

    Raises ValueError when the path is neither data nor a data set of the hub, when the source is empty, or for a bad
    root or weight.
    """
    if not 0 <= settings.weight < 1e6:
        raise ValueError(f"source {settings.path}: weight {settings.weight}, expected 0 to 1e6 (sources[].weight)")
    if settings.root and not is_remote(settings.root) and not Path(settings.root).is_dir():
        raise ValueError(f"source {settings.path}: root {settings.root} is not a folder (sources[].root)")
    path = Path(settings.path)
    if path.is_file():
        source = _open_files(settings, [path], side_folder(path, index_dir))
    elif path.is_dir():
        source = _open_folder(settings, path, index_dir)
    elif hub := HUB.fullmatch(settings.path):
        source = _open_hub(settings, hub.group(1))
    elif is_remote(settings.path):
        source = _open_remote(settings, index_dir)
    else:
        raise ValueError(f"source {settings.path}: {_what_is_missing(path)} (sources[].path)")
    if len(source) == 0:
        raise ValueError(f"source {settings.path} holds no records (sources[].path)")
    return source


def _root_of(settings: SourceSettings) -> Path | RemoteFolder | None:
    """What image paths are relative to: as stated, or the folder of the data. None for a data set of the hub."""
    if settings.root:
        return RemoteFolder(settings.root) if is_remote(settings.root) else Path(settings.root)
    if is_remote(settings.path):
        is_file = kind_of(PurePosixPath(settings.path)) is not None
        return (
            None
            if HUB.fullmatch(settings.path)
            else RemoteFolder(settings.path.rpartition("/")[0] if is_file else settings.path)
        )
    path = Path(settings.path)
    return path if path.is_dir() else path.parent if path.exists() else None


def _open_remote(settings: SourceSettings, index_dir: str) -> Source:
    """Data files on a remote file system, by their copies beside the index."""
    is_folder, files = list_remote(settings.path)
    path = PurePosixPath(settings.path)
    if is_folder:
        by_path = {PurePosixPath(file.address): file for file in files}
        files = [by_path[place] for place in chosen_files(list(by_path), path, settings.split, settings.path)]
    elif kind_of(path) is None:
        raise ValueError(f"source {settings.path}: {why_unread(path)} (sources[].path)")
    side = home_of_index(path, index_dir)
    source = _open_files(settings, [file.copied(side) for file in files], side, [file.address for file in files])
    source.fingerprint = repr([(file.address, file.num_bytes, file.version) for file in files])
    return source


def _open_hub(settings: SourceSettings, name: str) -> Source:
    import datasets

    try:
        dataset = datasets.load_dataset(name, split=settings.split)
    except (OSError, ValueError) as error:
        first_line = str(error).strip().partition("\n")[0]
        raise ValueError(f"source {settings.path}: cannot be loaded from the hub: {first_line}") from error
    return Source(settings, ArrowRows(dataset, settings.path), dataset._fingerprint)


def _what_is_missing(path: Path) -> str:
    """Why there is nothing at a path: the first folder of it that is not there, or a name that is nearly it."""
    missing = path
    while not missing.parent.exists():
        missing = missing.parent
    what = "no such file or folder" if missing == path else f"there is no {missing}"
    if meant := path_meant(path):
        return f"{what}; did you mean {meant}?"
    is_like_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) and not path.suffix
    return f"{what}; a data set of the hub is written hf://datasets/{path}" if is_like_hub else what


def _open_folder(settings: SourceSettings, folder: Path, index_dir: str) -> Source:
    if not ((folder / "state.json").exists() or (folder / "dataset_dict.json").exists()):
        return _open_files(settings, files_of_folder(folder, settings.split), side_folder(folder, index_dir))
    import datasets

    dataset = datasets.load_from_disk(str(folder))
    if isinstance(dataset, datasets.DatasetDict):
        if settings.split not in dataset:
            raise ValueError(f"source {folder}: no split {settings.split!r}, it has {list(dataset)} (sources[].split)")
        dataset = dataset[settings.split]
    return Source(settings, ArrowRows(dataset, str(folder)), dataset._fingerprint)


def _open_files(settings: SourceSettings, files: list[Path], side: Path, names: Sequence[str] = ()) -> Source:
    """Files of one kind as one source. side: where what is made of them goes. names: what the user knows them by."""
    names = names or [str(file) for file in files]
    kind = kind_of(files[0])
    fingerprint = repr([(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files])
    if kind is None:
        raise ValueError(f"source {settings.path}: {why_unread(files[0])} (sources[].path)")
    if kind == "Parquet":
        import datasets

        dataset = datasets.Dataset.from_parquet([str(file) for file in files])
        return Source(settings, ArrowRows(dataset, settings.path), fingerprint)
    if kind == "Arrow":
        return Source(settings, ArrowFileRows(files, settings.path), fingerprint)
    named = zip(files, names, strict=True)
    parts = [TarRows(file, name) if kind == "WebDataset" else _text_rows(file, side, name) for file, name in named]
    parts = [part for part in parts if len(part)]
    return Source(settings, parts[0] if len(parts) == 1 else ChainedRows(parts), fingerprint)


def _text_rows(file: Path, side: Path, name: str) -> TextRows:
    plain = file
    if file.suffix.lower() in COMPRESSIONS:
        has_lines = Path(file.stem).suffix.lower() in (".jsonl", ".ndjson")
        plain = unpacked(file, side, has_lines=has_lines)
    return (CsvRows if kind_of(file) == "CSV" else JsonRows)(plain, name)
