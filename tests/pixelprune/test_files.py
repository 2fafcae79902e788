"""A file or a folder appears under its name whole or not at all."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from pixelprune.files import whole_file, whole_folder, write_whole
from tests.ranks import ROOT


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def break_off(context: AbstractContextManager[Path], error: type[BaseException] = ZeroDivisionError) -> None:
    """Write in part, then fail."""
    with context as partial:
        (partial / "part" if partial.is_dir() else partial).write_bytes(b"part\n")
        raise error


@pytest.mark.parametrize("is_shared", [False, True])
def test_a_file_is_the_old_one_until_the_new_one_is_whole(tmp_path, is_shared):
    path = tmp_path / "result.json"
    write_whole(path, b"old")
    with whole_file(path, is_shared=is_shared) as partial:
        partial.write_bytes(b"ne")
        assert path.read_bytes() == b"old"
        partial.write_bytes(b"new")
    assert path.read_bytes() == b"new"
    with pytest.raises(KeyboardInterrupt):
        break_off(whole_file(path, is_shared=is_shared), KeyboardInterrupt)
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["result.json"]


def test_it_is_on_the_disk_before_it_bears_its_name(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    seen = []
    flush = os.fsync

    def fsync(number: int) -> None:
        seen.append((os.readlink(f"/proc/self/fd/{number}"), path.exists()))
        flush(number)

    monkeypatch.setattr(os, "fsync", fsync)
    write_whole(path, b"new")
    assert seen == [(str(tmp_path / ".result.json.partial"), False), (str(tmp_path), True)], "and so is the name"
    with whole_folder(tmp_path / "model") as partial:
        (partial / "below").mkdir()
        (partial / "below" / "weights").touch()
    assert seen[2:] == [(str(partial / "below" / "weights"), True), (str(tmp_path), True)]


def test_two_writers_of_a_shared_file_do_not_meet(tmp_path):
    path = tmp_path / "settings.json"
    with whole_file(path, is_shared=True) as one, whole_file(path, is_shared=True) as other:
        one.write_bytes(b"one")
        other.write_bytes(b"other")
    assert path.read_bytes() == b"one", "the last to finish"
    assert names(tmp_path) == ["settings.json"]


def test_what_is_written_in_sight_stays_when_it_fails(tmp_path):
    path = tmp_path / "train.jsonl"
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            break_off(whole_file(path, in_sight=True))
        assert names(tmp_path) == ["train.jsonl.partial"]
        assert (tmp_path / "train.jsonl.partial").read_bytes() == b"part\n"


def test_what_a_killed_writer_left_is_replaced_and_never_written_through(tmp_path):
    precious = tmp_path / "precious"
    precious.write_bytes(b"mine")
    code = f"""
import os
from pathlib import Path
from pixelprune.files import whole_file, whole_folder
with whole_file(Path("copy")) as partial, whole_folder(Path("model"), replace=True) as folder:
    os.link({str(precious)!r}, partial)
    (folder / "half").touch()
    os._exit(9)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 9
    assert names(tmp_path) == [".copy.partial", ".model.partial", "precious"]
    write_whole(tmp_path / "copy", b"new")
    with whole_folder(tmp_path / "model", replace=True) as folder:
        (folder / "whole").touch()
    assert names(tmp_path) == ["copy", "model", "precious"]
    assert names(tmp_path / "model") == ["whole"]
    assert precious.read_bytes() == b"mine"


def test_a_folder_replaces_another_only_when_told_and_only_when_whole(tmp_path):
    path = tmp_path / "model"
    for text in ("one", "two"):
        with whole_folder(path, replace=True) as partial:
            (partial / text).touch()
    with pytest.raises(ZeroDivisionError):
        break_off(whole_folder(path, replace=True))
    with pytest.raises(OSError, match=r"not empty.*/model'"), whole_folder(path) as partial:
        (partial / "four").touch()
    assert names(path) == ["two"]
    assert names(tmp_path) == ["model"]


def test_a_kill_between_the_two_renames_of_a_replacement_loses_no_folder(tmp_path):
    (tmp_path / ".model.old").mkdir()
    (tmp_path / ".model.old" / "one").touch()
    with pytest.raises(ZeroDivisionError):
        break_off(whole_folder(tmp_path / "model", replace=True))
    assert names(tmp_path) == ["model"]
    assert names(tmp_path / "model") == ["one"]


def test_errors_bear_the_name_that_the_user_knows(tmp_path):
    path = tmp_path / "none" / "result.json"
    for context in (lambda: write_whole(path, b""), lambda: whole_folder(tmp_path / "file" / "model").__enter__()):
        (tmp_path / "file").touch()
        with pytest.raises(OSError, match=r"(result\.json|file/model)'$"):
            context()
    with pytest.raises(OSError, match=r"result\.json'$"), whole_file(tmp_path / "result.json"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(OSError, match=r"other'$"), whole_file(tmp_path / "result.json"):
        (tmp_path / "other").read_bytes()
