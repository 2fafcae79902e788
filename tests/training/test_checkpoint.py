"""Saving when the disk does not do as it is told: what is complete stays, whatever happens around it."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from tests.ranks import ROOT
from training.checkpoint.checkpointer import Checkpointer
from training.checkpoint.files import checkpoint_folder, complete_checkpoints
from training.config.settings import CheckpointSettings
from training.distributed.fragments import KINDS, Fragment
from training.distributed.ranks import Ranks
from training.errors import RankError

CPU = torch.device("cpu")


def save(checkpointer: Checkpointer, step: int, num_elements: int = 2) -> None:
    """As the thread of a save does it, with one parameter."""
    fragments = [Fragment("a", 0, (num_elements,), {kind: torch.zeros(num_elements) for kind in KINDS})]
    folder = checkpoint_folder(checkpointer.root, step)
    checkpointer._write_or_keep_error(folder, fragments, {"torch": torch.zeros(1)}, {"world_size": 1})


def names(checkpointer: Checkpointer) -> list[str]:
    return [folder.name for folder in complete_checkpoints(checkpointer.root)]


@pytest.fixture
def alone(tmp_path) -> Checkpointer:
    settings = CheckpointSettings(keep_last=1, on_error="continue")
    return Checkpointer(tmp_path, settings, Ranks(0, 1, 0, CPU), {})


def fail_to_delete(monkeypatch, which: str) -> None:
    """Deletions of that folder meet a file which NFS keeps for another process."""
    delete = shutil.rmtree

    def rmtree(path, *arguments, **options):
        if which in str(path):
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(path))
        delete(path, *arguments, **options)

    monkeypatch.setattr(shutil, "rmtree", rmtree)


def test_an_old_checkpoint_that_cannot_be_deleted_costs_nothing(alone, monkeypatch, caplog):
    save(alone, 1)
    fail_to_delete(monkeypatch, "step-00000001")
    with caplog.at_level(logging.WARNING):
        save(alone, 2)
    assert not alone.has_failed
    assert alone.finish()
    assert names(alone) == ["step-00000002"]
    assert "step-00000001: an old checkpoint that could not be deleted" in caplog.text
    save(alone, 3)
    assert names(alone) == ["step-00000003"]


def test_a_failure_after_the_marker_leaves_the_checkpoint(alone, monkeypatch):
    monkeypatch.setattr(alone, "_delete_old", lambda: 1 / 0)
    save(alone, 1)
    assert alone.has_failed
    assert names(alone) == ["step-00000001"]


def test_leftovers_that_cannot_be_removed_are_named(alone, monkeypatch):
    (alone.root / "step-00000004").mkdir(parents=True)
    fail_to_delete(monkeypatch, "step-00000004")
    with pytest.raises(RankError, match=r"step-00000004: cannot be removed .*; remove it and start again"):
        alone.latest()


def test_space_is_needed_for_the_parts_of_all_ranks(tmp_path, monkeypatch):
    """Eight ranks that write 300 MB each: 2 GB of space are too little, though this rank's part would fit."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 0, 2 * 10**9))
    checkpointer = Checkpointer(tmp_path, CheckpointSettings(), Ranks(3, 8, 3, CPU), {})
    save(checkpointer, 1, num_elements=25_000_000)
    with pytest.raises(RankError, match=r"2\.47 GB needed by 8 ranks together, 2\.00 GB free"):
        checkpointer.finish()


def test_parts_that_others_have_written_need_no_more_space(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 0, 2 * 10**9))
    folder = checkpoint_folder(tmp_path / "checkpoints", 1)
    folder.mkdir(parents=True)
    written: Path = folder / "fragments-000-of-008.safetensors"
    with written.open("wb") as file:
        file.truncate(10**9)
    checkpointer = Checkpointer(tmp_path, CheckpointSettings(), Ranks(3, 8, 3, CPU), {})
    save(checkpointer, 1, num_elements=25_000_000)
    assert checkpointer.finish()


CRASH = """
import torch
from pathlib import Path
from training.checkpoint import checkpointer as module
from training.config.settings import CheckpointSettings
from training.distributed.ranks import Ranks

module._CRASH_SECONDS = 0.5
module.own_fragments = lambda engine: []
module.num_adam_steps = lambda engine: 1
# The other rank is gone and never writes its part.
one = module.Checkpointer(Path("run"), CheckpointSettings(), Ranks(0, 2, 0, torch.device("cpu")), {})
one.save(None, module.RunState(step=1))
raise RuntimeError("the other host is gone")
"""


def test_a_crash_does_not_wait_for_ranks_that_are_gone(tmp_path):
    """Not the 30 minutes of checkpoint.save_timeout_minutes: the launcher of other hosts has nobody to kill it."""
    done = subprocess.run(
        [sys.executable, "-c", CRASH], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "the other host is gone" in done.stderr
    assert "a save is under way: it has 0 s to become complete" in done.stderr
    assert complete_checkpoints(tmp_path / "run" / "checkpoints") == []
