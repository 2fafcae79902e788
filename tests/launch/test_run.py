"""A launch as a whole: lock, snapshot of each start, restarts, and the file that asks to stop."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest

from launch.restart import RestartPolicy
from launch.run import Launch, run_launch
from training.config.recipe import load_recipe
from training.errors import UserError
from training.exit_codes import RESUMABLE, STOP_FILE
from training.loop.folder_lock import FolderLock


@pytest.fixture
def launch(tmp_path) -> Launch:
    """A run whose third start finishes; each gets one step further."""
    config = load_recipe("configs/debug.yaml", [f"run.folder={tmp_path}"])
    count = 'cd "$1"; n=$(ls -d launch-0* | wc -l); echo "{\\"step\\": $n}" >> metrics.jsonl; '
    script = count + '[ "$n" = 3 ] && exit 0; exit 7'
    return Launch(config, lambda: ["bash", "-c", script, "rank", str(tmp_path / "debug")], dict(os.environ))


def test_restarts_end_with_the_finished_run_and_each_start_is_on_record(launch, tmp_path):
    assert run_launch(launch, RestartPolicy(num_restarts=1, pause_seconds=0)) == 0
    folders = sorted(path.name for path in (tmp_path / "debug").glob("launch-0*"))
    assert folders == ["launch-0001", "launch-0002", "launch-0003"]
    facts = json.loads((tmp_path / "debug" / "launch-0003" / "launch.json").read_text())
    assert facts["command"].startswith("bash -c")
    FolderLock(tmp_path / "debug").acquire().release()


def test_without_restarts_the_failure_comes_back_and_is_said(launch, caplog):
    """DeepSpeed's own launchers are silent."""
    assert run_launch(launch, RestartPolicy()) == 7
    assert "failed with code 7: what the ranks said stands above" in caplog.text


def test_locked_folder_is_refused_before_anything_is_written(launch, tmp_path):
    with FolderLock(tmp_path / "debug"), pytest.raises(UserError, match="another run has this folder"):
        run_launch(launch, RestartPolicy())
    assert [path.name for path in (tmp_path / "debug").iterdir()] == ["launch.lock"]


def test_stop_file_is_a_request_to_stop_and_an_old_one_does_not_count(launch, tmp_path):
    stop_file = tmp_path / "debug" / STOP_FILE
    stop_file.parent.mkdir()
    stop_file.touch()
    script = f'[ -e "$1" ] && exit 9; touch "$1"; exit {RESUMABLE}'
    launch = dataclasses.replace(launch, make_command=lambda: ["bash", "-c", script, "rank", str(stop_file)])
    assert run_launch(launch, RestartPolicy(num_restarts=5, pause_seconds=0)) == RESUMABLE
    assert len(list(Path(tmp_path / "debug").glob("launch-0*"))) == 1
