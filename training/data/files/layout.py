"""Which files of a folder are a source's: of one kind, and of one split where their names say splits."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import TypeVar

from training.data.files.unpacked import COMPRESSIONS

__all__ = ["KINDS", "chosen_files", "files_of_folder", "kind_of", "stem_of", "why_unread"]

P = TypeVar("P", bound=PurePath)

KINDS = {
    ".jsonl": "JSON",
    ".ndjson": "JSON",
    ".json": "JSON",
    ".csv": "CSV",
    ".parquet": "Parquet",
    ".arrow": "Arrow",
    ".tar": "WebDataset",
}
"""Suffix -> the kind of file; those of text may have a compression's suffix behind theirs."""
_TEXT = ("JSON", "CSV")
_UNPACKERS = {".gz": "gunzip", ".tgz": "gunzip", ".zst": "zstd -d"}
SUFFIXES = ", ".join([*KINDS, *(f".jsonl{packed}" for packed in COMPRESSIONS)])
"""What is read, for messages."""

_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""The names of `datasets` for splits in file names -> the split."""
_SHARD = re.compile(r"([\w.]+?)-\d{5}-of-\d{5}")
_WORD = re.compile(rf"({'|'.join(_SPLITS)})(?![^\W\d_])", re.IGNORECASE)


def kind_of(path: PurePath) -> str | None:
    """A value of KINDS, None for what is not read."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    is_packed = bool(suffixes) and suffixes[-1] in COMPRESSIONS
    suffix = suffixes[-2] if is_packed and len(suffixes) > 1 else suffixes[-1] if suffixes else ""
    kind = KINDS.get(suffix)
    return None if is_packed and kind not in _TEXT else kind


def why_unread(path: PurePath) -> str:
    """Of a file without a kind: what is wrong with its name, and what would be read."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    packing = suffixes[-1] if suffixes else ""
    inner = ".tar" if packing == ".tgz" else "".join(suffixes[:-1])
    if packing in _UNPACKERS and inner in KINDS:
        return (
            f"{path.name} is compressed, and {KINDS[inner]} is read by places in the file; unpack it to a {inner} "
            f"first ({_UNPACKERS[packing]})"
        )
    return f"{''.join(suffixes) or 'no'} suffix, expected {SUFFIXES}"


def stem_of(path: PurePath) -> str:
    """The name without the suffixes of its format."""
    return Path(path.stem).stem if path.suffix.lower() in COMPRESSIONS else path.stem


def files_of_folder(folder: Path, split: str) -> list[Path]:
    """The data files of a local folder, as `chosen_files`."""
    places = [place for place in (folder, folder / "data") if place.is_dir()]
    return chosen_files([path for place in places for path in place.iterdir() if path.is_file()], folder, split)


def chosen_files(files: Sequence[P], folder: PurePath, split: str, name: str = "") -> list[P]:
    """The data files among these, in name order; where none lies in `folder` itself, those of its folder `data`.

    Where names begin with a split (`train-00000-of-00004.parquet`, as on the hub), those of `split` alone. name: the
    folder's, for messages.
    Raises ValueError when there is none, for several kinds, and where names leave open what belongs to the split.
    """
    name = name or str(folder)
    data = sorted(path for path in files if _is_data(path))
    data = [path for path in data if path.parent == folder] or data
    if not data:
        packed = next((path for path in sorted(files) if path.suffix.lower() in _UNPACKERS), None)
        why = f"no {SUFFIXES} file or saved data set in this folder" if packed is None else why_unread(packed)
        raise ValueError(f"source {name}: {why} (sources[].path)")
    kinds = sorted({str(kind_of(path)) for path in data})
    if len(kinds) > 1:
        raise ValueError(
            f"source {name}: holds {' and '.join(kinds)} files, expected one kind; "
            "give one of the files, or keep them in folders of their own (sources[].path)"
        )
    return _of_split(name, data, split)


def _is_data(path: PurePath) -> bool:
    # data_tools writes beside the records: report.json, NAME.report.json, NAME.dropped.jsonl; `datasets` and the hub:
    # dataset_infos.json.
    is_report = path.name in ("report.json", "dataset_infos.json")
    return kind_of(path) is not None and not is_report and not path.name.endswith((".report.json", ".dropped.jsonl"))


def _of_split(folder: str, files: list[P], split: str) -> list[P]:
    by_split: dict[str, list[P]] = {}
    for path in files:
        by_split.setdefault(_split_of(path), []).append(path)
    unnamed = by_split.pop("", [])
    if not by_split:
        return files
    wanted = _SPLITS.get(split.lower(), split)
    if wanted not in by_split:
        raise ValueError(
            f"source {folder}: no file of split {split!r}, it has {', '.join(sorted(by_split))} (sources[].split)"
        )
    if unnamed and len(by_split) > 1:
        raise ValueError(
            f"source {folder}: {unnamed[0].name} beside the splits {', '.join(sorted(by_split))} says none; give one "
            "of the files, or keep splits in folders of their own (sources[].path)"
        )
    return sorted([*by_split[wanted], *unnamed])


def _split_of(path: PurePath) -> str:
    """The split that a file's name begins with, "" where it names none."""
    shard, word = _SHARD.match(path.name), _WORD.match(path.name)
    name = shard.group(1) if shard else word.group(1) if word else ""
    return _SPLITS.get(name.lower(), name)
