"""A file or a folder appears under its name whole or not at all, also after a kill or a power cut. And names of files
that are nearly right."""

from __future__ import annotations

import contextlib
import difflib
import errno
import glob
import logging
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["PARTIAL", "path_meant", "whole_file", "whole_folder", "write_whole"]

PARTIAL = ".partial"
"""Ends the name of what is being written."""

_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})

logger = logging.getLogger(__name__)


def write_whole(path: Path, data: bytes, *, is_shared: bool = False) -> None:
    """Write the bytes as one file, or replace it by them; is_shared as for `whole_file`."""
    with whole_file(path, is_shared=is_shared) as partial:
        partial.write_bytes(data)


@contextmanager
def whole_file(
    path: Path, *, is_shared: bool = False, is_durable: bool = True, in_sight: bool = False
) -> Iterator[Path]:
    """A path beside `path` to write to: it becomes `path` when the block ends well, and goes when it does not.

    is_shared: several processes may write this file at once; the last one stays. Otherwise what a killed one left is
    replaced. is_durable: on the disk before it bears its name. in_sight: named NAME.partial and left when the block
    fails, for records that are worth looking at while they are made. An OSError bears the name that the user knows.
    """
    if in_sight:
        partial = path.with_name(path.name + PARTIAL)
    else:
        token = f".{secrets.token_hex(4)}" if is_shared else ""
        partial = path.with_name(f".{path.name}{token}{PARTIAL}")
    with _errors_name(path, partial):
        partial.unlink(missing_ok=True)  # it may be a link to a file that must not be written to
        try:
            yield partial
            if is_durable:
                _flush(partial)
            partial.replace(path)
            if is_durable:
                _flush_name(path)
        except BaseException:
            if not in_sight:
                with contextlib.suppress(OSError):  # what went wrong first is what counts
                    partial.unlink(missing_ok=True)
            raise


@contextmanager
def whole_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """An empty folder beside `path`: it becomes `path` when the block ends well, and goes when it does not.

    replace: the caller is the only one who writes `path`: a folder of that name, and what a killed writer left, is
    replaced. Otherwise `path` must not exist, and what is left of others is named in the log.
    """
    old = path.with_name(f".{path.name}.old")
    if replace:
        partial = path.with_name(f".{path.name}{PARTIAL}")
        shutil.rmtree(partial, ignore_errors=True)
        if old.exists() and not path.exists():
            old.rename(path)  # a kill came between the two renames below
    else:
        for left in path.parent.glob(f".{glob.escape(path.name)}.*{PARTIAL}"):
            logger.warning("%s is left of a writer that was killed, unless one still runs: remove it", left)
        partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}{PARTIAL}")
    with _errors_name(path, partial):
        partial.mkdir(parents=True)
        try:
            yield partial
            for file in partial.rglob("*"):
                if file.is_file():
                    _flush(file)
            if replace and path.exists():
                shutil.rmtree(old, ignore_errors=True)
                path.rename(old)
            partial.rename(path)
            _flush_name(path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    if replace:
        shutil.rmtree(old, ignore_errors=True)


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _flush_name(path: Path) -> None:
    """The folder's entry, without which a power cut takes the file away again. Some network file systems have none."""
    with contextlib.suppress(OSError):
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextmanager
def _errors_name(path: Path, partial: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        # A write that finds no room names no file at all.
        if str(error.filename) == str(partial) or (error.filename is None and error.errno in _NO_ROOM):
            error.filename = str(path)
        raise


def path_meant(path: Path) -> Path | None:
    """What was probably meant by a path where nothing is: a name nearly like its first part that is not there."""
    missing = path
    while not missing.parent.exists():
        missing = missing.parent
    names = [other.name for other in missing.parent.iterdir()] if missing.parent.is_dir() else []
    near = difflib.get_close_matches(missing.name, names)
    # Names that have but their suffix in common are not near.
    near = [name for name in near if difflib.get_close_matches(missing.stem, [Path(name).stem], n=1)]
    return missing.with_name(near[0]) if near else None
