"""Sources on remote file systems, through fsspec: data files are copied once, images are read below the source's root.

Which addresses there may be: training/data/files/address.py.
"""

from __future__ import annotations

import logging
import os
import posixpath
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from pixelprune.files import whole_file
from pixelprune.records.record import RecordError
from training.data.files.address import SCHEMES, is_remote
from training.data.files.unpacked import one_at_a_time

__all__ = ["RemoteFile", "RemoteFolder", "list_remote"]

logger = logging.getLogger(__name__)

_COPY_BYTES = 1 << 22


@dataclass(frozen=True)
class RemoteFile:
    """One data file: where it is, and what changes with its content."""

    address: str
    path: str
    num_bytes: int
    version: str

    def copied(self, folder: Path) -> Path:
        """The file's copy in `folder`, made where it is missing; its name ends with the remote one's.

        Raises ValueError when it cannot be read or written.
        """
        key = xxhash.xxh3_64(repr((self.address, self.num_bytes, self.version)).encode()).hexdigest()
        made = folder / "copied" / f"{key}-{posixpath.basename(self.path)}"
        if made.exists():
            return made
        try:
            made.parent.mkdir(parents=True, exist_ok=True)
            with one_at_a_time(made.parent / f"{key}.lock"):
                if not made.exists():
                    self._copy_to(made)
        except OSError as error:
            raise ValueError(
                f"source {self.address}: cannot be copied to {made.parent}: {type(error).__name__} "
                f"{error.strerror or ''} (data.index_dir names another place)"
            ) from error
        return made

    def _copy_to(self, made: Path) -> None:
        logger.info("copying %s to %s", self.address, made)
        num_read = 0
        with whole_file(made, is_shared=True) as partial, partial.open("wb") as out:
            with _file_system(self.address).open(self.path, "rb") as file:
                while data := file.read(_COPY_BYTES):
                    num_read += out.write(data)
            if num_read != self.num_bytes:
                raise ValueError(
                    f"source {self.address}: {num_read} bytes came of {self.num_bytes}: changed, or cut off"
                )


def list_remote(address: str) -> tuple[bool, list[RemoteFile]]:
    """(whether the address is a folder, the files right in it or in its folder `data`, or the file itself).

    Raises ValueError in one line when there is nothing, or it cannot be reached.
    """
    file_system = _file_system(address)
    try:
        path = file_system._strip_protocol(address)
        info = file_system.info(path)
        if info["type"] != "directory":
            return False, [_remote_file(address, file_system, info)]
        entries = []
        for folder in (path, f"{path}/data"):
            if folder == path or file_system.isdir(folder):
                entries += [entry for entry in file_system.ls(folder, detail=True) if entry["type"] == "file"]
        base = address.rstrip("/")
        return True, [
            _remote_file(base + entry["name"][len(path.rstrip("/")) :], file_system, entry) for entry in entries
        ]
    except FileNotFoundError as error:
        raise ValueError(f"source {address}: no such file or folder (sources[].path)") from error
    except Exception as error:  # every file system has errors of its own, whose words may hold a signed address
        raise ValueError(
            f"source {address}: cannot be reached ({type(error).__name__}); check the address and the credentials of "
            "the environment (sources[].path)"
        ) from error


def _remote_file(address: str, file_system: Any, info: dict[str, Any]) -> RemoteFile:
    size = info.get("size")
    if not isinstance(size, int):
        raise ValueError(f"source {address}: its size is unknown (sources[].path)")
    return RemoteFile(address, info["name"], size, str(file_system.ukey(info["name"])))


def _file_system(address: str) -> Any:
    """The file system of an address. Raises ValueError when its package is missing."""
    import fsspec

    scheme = address.partition("://")[0]
    try:
        return fsspec.filesystem(scheme)
    except ImportError as error:
        raise ValueError(
            f"{scheme}:// needs the package {SCHEMES.get(scheme, scheme)}, which is not installed"
        ) from error


@dataclass
class RemoteFolder:
    """The folder that a remote source's image paths are relative to and may not leave.

    Every process opens its own file system: their connections do not outlive a fork.
    """

    address: str
    _opened: tuple[int, Any] | None = field(default=None, repr=False, compare=False)

    def read(self, name: str, max_bytes: int) -> bytes:
        """An image's encoded bytes. Raises RecordError: outside_root, missing_file, empty_file, file_too_large or
        unreadable_file."""
        path, file_system = self._place(name)
        try:
            data = file_system.cat_file(path, start=0, end=max_bytes + 1)
        except FileNotFoundError as error:
            raise RecordError("missing_file", f"image {name[:200]!r}: no such file under {self.address}") from error
        except Exception as error:
            raise RecordError(
                "unreadable_file", f"image {name[:200]!r} under {self.address}: {type(error).__name__}"
            ) from error
        if not data:
            raise RecordError("empty_file", f"image {name[:200]!r} under {self.address} has zero bytes")
        if len(data) > max_bytes:
            raise RecordError(
                "file_too_large",
                f"image {name[:200]!r} under {self.address} has more than data.max_file_bytes={max_bytes}",
            )
        return data

    def describe(self, name: str) -> str:
        """What changes with the image's content; its name alone where it cannot be found."""
        try:
            path, file_system = self._place(name)
            return f"{name} {file_system.ukey(path)}"
        except Exception:  # noqa: BLE001 - reading it will say what is wrong
            return name

    def _place(self, name: str) -> tuple[str, Any]:
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = os.getpid(), _file_system(self.address)
        file_system = self._opened[1]
        root = file_system._strip_protocol(self.address).rstrip("/")
        path = posixpath.normpath(posixpath.join(root, name))
        is_inside = path.startswith(f"{root}/") and ".." not in name.replace("\\", "/").split("/")
        if not is_inside or "\0" in name or is_remote(name):
            raise RecordError("outside_root", f"image {name[:200]!r} lies outside the source's root (sources[].root)")
        return path, file_system

    def __getstate__(self) -> dict[str, Any]:
        return {"address": self.address, "_opened": None}
