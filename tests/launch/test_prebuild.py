"""The lock of DeepSpeed's extension: waited for while a process holds it, removed when a killed one left it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from training.distributed import build_lock

HOLDER = """
import sys, time
from torch.utils.file_baton import FileBaton
baton = FileBaton(sys.argv[1])
assert baton.try_acquire()
print("held", flush=True)
time.sleep(float(sys.argv[2]))
baton.release()
"""


@pytest.fixture
def lock(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    from torch.utils.cpp_extension import _get_build_directory

    return Path(_get_build_directory("deepspeed_shm_comm", verbose=False)) / "lock"


def _hold(lock, seconds: float) -> subprocess.Popen:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(lock), str(seconds)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    return holder


def _make_old(lock, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(lock, (then, then))


def test_no_lock_no_wait(lock):
    build_lock.clear_stale_lock()


def test_lock_of_a_killed_process_is_removed(lock, caplog):
    holder = _hold(lock, 600)
    holder.kill()
    holder.wait()
    assert lock.exists()
    _make_old(lock, 121)
    build_lock.clear_stale_lock()
    assert not lock.exists()
    assert "left 121 seconds ago by a killed process" in caplog.text


def test_lock_of_a_living_process_is_waited_for_however_old(lock, caplog):
    holder = _hold(lock, 3)
    _make_old(lock, 1000)
    build_lock.clear_stale_lock()
    assert holder.wait(10) == 0, "the lock was taken from a living process, which then failed to release it"
    assert f"process {holder.pid} builds" in caplog.text


def test_young_lock_without_a_process_is_given_time(lock, monkeypatch):
    monkeypatch.setattr(build_lock, "_STALE_AFTER_SECONDS", 2.0)
    lock.touch()
    began = lock.stat().st_mtime
    build_lock.clear_stale_lock()
    assert not lock.exists()
    assert time.time() > began + 2.0


def test_ranks_that_anyone_starts_do_not_wait_for_a_stale_lock(tmp_path):
    """By torchrun, the deepspeed launcher, Slurm or alone: the lock goes as the ranks join."""
    from torch.utils.cpp_extension import _get_build_directory

    built = Path(_get_build_directory("deepspeed_shm_comm", verbose=False))
    shutil.copytree(built, tmp_path / built.name)
    lock = tmp_path / built.name / "lock"
    lock.touch()
    _make_old(lock, 1000)
    code = "from training.distributed.ranks import join_ranks; join_ranks()"
    environment = os.environ | {"TORCH_EXTENSIONS_DIR": str(tmp_path), "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not lock.exists()
    assert "removing a build lock left" in done.stderr


def test_the_cpu_extension_is_built_on_gpu_machines_too(monkeypatch):
    """Tests start CPU ranks there: a first start that compiles could be killed, and leave its lock."""
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    code = "\n".join(
        [
            "from launch.prebuild import prebuild; prebuild()",
            "from deepspeed.accelerator import get_accelerator; from deepspeed.ops.op_builder.builder import OpBuilder",
            "print(get_accelerator().device_name(), *OpBuilder._loaded_ops)",
        ]
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1:] == ["cuda deepspeed_shm_comm"], done.stderr
