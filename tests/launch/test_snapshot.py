"""What a launch keeps, and what it must never keep."""

from __future__ import annotations

import json
import subprocess
import tarfile
from pathlib import Path

import pytest

from launch.snapshot import save_snapshot


@pytest.fixture
def checkout(tmp_path) -> Path:
    folder = tmp_path / "checkout"
    folder.mkdir()
    (folder / "a.py").write_text("one = 1\n")
    (folder / "name with ä.py").write_text("two = 2\n")
    git(folder, "init", "-q")
    git(folder, "remote", "add", "origin", "https://user:sesame@host.invalid/code.git")
    commit(folder)
    return folder


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=n", "-c", "user.email=e@host.invalid"]
    return subprocess.run(
        ["git", "-C", folder, *identity, *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


def commit(folder: Path) -> None:
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "m")


def files_in(archive: Path) -> dict[str, bytes]:
    with tarfile.open(archive) as tar:
        return {entry.name: tar.extractfile(entry).read() for entry in tar}


def test_code_is_what_is_on_disk_with_commit_and_difference(tmp_path, checkout):
    head = git(checkout, "rev-parse", "HEAD")
    (checkout / "a.py").write_text("one = 11\n")
    (checkout / "new.py").write_text("password = 'sesame'\n")
    folder = save_snapshot(tmp_path / "run", ["deepspeed", "a b"], "run: {}\n", checkout=checkout)
    assert folder.name == "launch-0001"
    assert (folder / "config.yaml").read_text() == "run: {}\n"
    assert files_in(folder / "code.tar.gz") == {"a.py": b"one = 11\n", "name with ä.py": b"two = 2\n"}
    assert "+one = 11" in (folder / "changes.diff").read_text()
    facts = json.loads((folder / "launch.json").read_text())
    assert facts["commit"] == head
    assert facts["is_changed"] is True
    assert facts["untracked"] == ["new.py"]
    assert facts["command"] == "deepspeed 'a b'"


def test_secrets_of_the_environment_and_of_remotes_and_untracked_files_stay_out(tmp_path, checkout, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "sesame")
    (checkout / ".env").write_text("KEY=sesame\n")
    folder = save_snapshot(tmp_path / "run", ["deepspeed"], "run: {}\n", checkout=checkout)
    content = [path.read_bytes() for path in folder.iterdir()] + list(files_in(folder / "code.tar.gz").values())
    assert not any(b"sesame" in part for part in content)


def test_same_code_is_kept_once_and_other_code_again(tmp_path, checkout):
    run = tmp_path / "run"
    folders = [save_snapshot(run, ["x"], "", checkout=checkout) for _ in range(2)]
    (checkout / "a.py").write_text("one = 3\n")
    folders.append(save_snapshot(run, ["x"], "", checkout=checkout))
    assert [folder.name for folder in folders] == ["launch-0001", "launch-0002", "launch-0003"]
    assert [(folder / "code.tar.gz").exists() for folder in folders] == [True, False, True]
    facts = [json.loads((folder / "launch.json").read_text())["code"] for folder in folders]
    assert facts == ["launch-0001/code.tar.gz", "launch-0001/code.tar.gz", "launch-0003/code.tar.gz"]


def test_large_files_are_left_out_and_named(tmp_path, checkout):
    (checkout / "weights.bin").write_bytes(b"\0" * 1_000_001)
    commit(checkout)
    folder = save_snapshot(tmp_path / "run", ["x"], "", checkout=checkout)
    assert "weights.bin" not in files_in(folder / "code.tar.gz")
    assert json.loads((folder / "launch.json").read_text())["left_out"] == ["weights.bin"]


def test_outside_of_a_checkout_it_says_so(tmp_path):
    folder = save_snapshot(tmp_path / "run", ["x"], "", checkout=tmp_path)
    assert json.loads((folder / "launch.json").read_text())["code"] == "not a git checkout"
