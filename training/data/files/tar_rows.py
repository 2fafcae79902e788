"""Records of a WebDataset shard: a .tar whose members KEY.json, KEY.png, ... are one record. Nothing is extracted.

The headers are read once for every member's place; JSON and images are then read by their offsets. The JSON may name
its images by the members' names; one that names none gets all images of its key, in the order of the archive. A member
of another kind is a key of the record, called as its extension with the dot: ignored by that name, or refused.
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa

from pixelprune.records.image_part import IMAGE_KEYS
from pixelprune.records.record import RecordError
from training.data.files.byte_file import ByteFile
from training.data.files.json_rows import check_size

__all__ = ["TarRows"]

IMAGE_SUFFIXES = frozenset(("png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff"))
_TURNS = ("messages", "conversations", "prompt", "completion")


class TarRows:
    """Records of one shard, in the order of their first members. Picklable.

    A key whose members are no record (no JSON, a name twice, a link or a device in place of a file) is refused when it
    is asked for. Raises ValueError for a file that is no whole, uncompressed archive.
    """

    def __init__(self, path: Path, name: str = ""):
        """path, name: as in `JsonRows`."""
        self.path = path
        self.name = name or str(path)
        # Of M members, those of record i at starts[i] to starts[i + 1]. offset -1: no regular file.
        self._names, self._offsets, self._sizes, self._starts = _scan(path, self.name)
        self._bytes = ByteFile(path, self.name)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, row: int) -> Any:
        """The parsed record, images as their encoded bytes.

        Raises RecordError (bad_member, invalid_json, record_too_large, image_count); UserError as `ByteFile.read`.
        """
        members = self._members(row)
        if "json" not in members:
            raise RecordError("bad_member", f"no .json among the members {', '.join(map(repr, members))}")
        try:
            record = json.loads(self._read(*members.pop("json")))
        except (ValueError, RecursionError) as error:
            raise RecordError("invalid_json", f"not valid JSON: {error}") from error
        if not isinstance(record, dict):
            return record
        images = {kind: place for kind, place in members.items() if kind.rpartition(".")[2] in IMAGE_SUFFIXES}
        for kind in members.keys() - images.keys():
            record[f".{kind}"] = f"a member of {members[kind][2]} bytes"
        return self._with_images(record, images)

    def where(self, row: int) -> str:
        return f"{self.name}, {_split(self._names[int(self._starts[row])].as_py())[0]}"

    def _members(self, row: int) -> dict[str, tuple[str, int, int]]:
        """Extension -> (name, offset, size) of a record's members."""
        members: dict[str, tuple[str, int, int]] = {}
        for i in range(int(self._starts[row]), int(self._starts[row + 1])):
            name = self._names[i].as_py()
            kind = _split(name)[1]
            if self._offsets[i] < 0:
                raise RecordError("bad_member", f"member {name!r} is a link, a device or sparse, expected a plain file")
            if kind in members:
                raise RecordError("bad_member", f"member {name!r} is there twice")
            check_size(int(self._sizes[i]), f"member {name!r}")
            members[kind] = (name, int(self._offsets[i]), int(self._sizes[i]))
        return members

    def _read(self, name: str, offset: int, size: int) -> bytes:
        return self._bytes.read(offset, offset + size)

    def _with_images(self, record: dict[str, Any], images: dict[str, tuple[str, int, int]]) -> dict[str, Any]:
        """The record with bytes where it names a member, or with all images of its key where it names none."""
        by_name = {name: place for place in images.values() for name in (place[0], PurePosixPath(place[0]).name)}
        used: set[str] = set()

        def named(value: Any) -> Any:
            if isinstance(value, list):
                return [named(element) for element in value]
            place = by_name.get(value.removeprefix("./")) if isinstance(value, str) else None
            if place is None:
                return value
            used.add(place[0])
            return self._read(*place)

        record = {key: named(value) if key in ("image", "images") else value for key, value in record.items()}
        for key in _TURNS:
            if isinstance(record.get(key), list):
                record[key] = [_with_parts(turn, named) for turn in record[key]]
        if images and not used and not record.get("image") and not record.get("images"):
            return record | {"images": [self._read(*place) for place in images.values()]}
        unused = [name for name, _, _ in images.values() if name not in used]
        if unused:
            raise RecordError("image_count", f"member {unused[0]!r} is not among the images that the record names")
        return record


def _with_parts(turn: Any, named: Any) -> Any:
    """A turn whose typed parts hold bytes where they name a member."""
    content = turn.get("content") if isinstance(turn, dict) else None
    if not isinstance(content, list):
        return turn
    parts = [
        {key: named(value) if key in IMAGE_KEYS else value for key, value in part.items()}
        if isinstance(part, dict)
        else part
        for part in content
    ]
    return {**turn, "content": parts}


def _split(name: str) -> tuple[str, str]:
    """The key of a member, and its extension in lower case: what follows the first dot of the file's name."""
    folder, slash, file = name.rpartition("/")
    stem, _, kind = file.partition(".")
    return folder + slash + stem, kind.lower()


def _scan(path: Path, shown: str) -> tuple[pa.Array, np.ndarray, np.ndarray, np.ndarray]:
    """Names, offsets, sizes (M,) of the members, grouped by record, and where each record's begin (n + 1,)."""
    records: dict[str, list[tuple[str, int, int]]] = {}
    try:
        with tarfile.open(path, "r:", errors="replace") as archive:
            while (member := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # else every header would stay in memory
                name = member.name.removeprefix("./")
                # What archivers add of their own (._a.png, __MACOSX) has no key, as in WebDataset.
                if member.isdir() or name.rpartition("/")[2].startswith(".") or name.startswith("__MACOSX/"):
                    continue
                is_plain = member.isreg() and not member.issparse()
                place = (name, member.offset_data if is_plain else -1, member.size)
                records.setdefault(_split(name)[0], []).append(place)
    except (tarfile.TarError, OSError, ValueError) as error:
        raise ValueError(f"source {shown}: damaged, or no uncompressed .tar: {error} (sources[].path)") from error
    members = [place for group in records.values() for place in group]
    starts = np.concatenate([[0], np.cumsum([len(group) for group in records.values()])]).astype(np.int64)
    names = pa.array([name for name, _, _ in members], pa.large_string())
    offsets, sizes = (np.array([place[i] for place in members], dtype=np.int64) for i in (1, 2))
    return names, offsets, sizes, starts
