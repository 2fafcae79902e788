"""Threads of a rank: the recipe's, the user's, or its share of the cores that it may use."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch

from launch.environment import rank_environment
from tests.ranks import ROOT
from training.distributed import cores
from training.distributed.cores import usable_cores
from training.distributed.ranks import Ranks

REPORT = (
    "from training.distributed.cores import use_threads as u; import torch; print(u({}, 1), torch.get_num_threads())"
)


def threads_of_a_rank(asked: int, **environment: str) -> str:
    """What a process with share 1 computes with: torch reads its environment once, at its start."""
    kept = {key: value for key, value in os.environ.items() if not key.endswith("_NUM_THREADS")}
    kept |= {"OMP_DYNAMIC": "false", "MKL_DYNAMIC": "false"} | environment
    command = [sys.executable, "-c", REPORT.format(asked)]
    return subprocess.run(command, cwd=ROOT, env=kept, capture_output=True, text=True, check=True).stdout.strip()


def test_the_recipe_goes_before_the_user_and_the_user_before_the_share():
    assert threads_of_a_rank(0) == "1 1"
    assert threads_of_a_rank(0, OMP_NUM_THREADS="2") == "2 2"
    assert threads_of_a_rank(3, OMP_NUM_THREADS="2") == "3 3"


def test_the_launcher_hands_on_the_same(monkeypatch):
    monkeypatch.setattr("launch.environment.usable_cores", lambda: 12)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert rank_environment(4)["OMP_NUM_THREADS"] == "3"
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert rank_environment(4)["OMP_NUM_THREADS"] == "5"
    assert rank_environment(4, threads_per_rank=2)["OMP_NUM_THREADS"] == "2"


def test_cores_are_those_of_the_binding_and_of_the_quota(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(cores, "_CGROUP", tmp_path)
    assert usable_cores() == 6
    ranks = Ranks(0, 4, 0, torch.device("cpu"), world_size_per_node=4, ranks_on_cores=3)
    assert ranks.cores_per_rank == 2
    (tmp_path / "cpu.max").write_text("250000 100000\n")
    assert usable_cores() == 3
    assert ranks.cores_per_rank == 1
    (tmp_path / "cpu.max").write_text("20000 100000\n")
    assert usable_cores() == 1


@pytest.mark.parametrize(("quota", "expected"), [("-1", math.inf), ("150000", 1.5)])
def test_the_quota_of_older_control_groups(quota, expected, tmp_path):
    assert cores._quota(tmp_path) == math.inf
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(quota + "\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert cores._quota(tmp_path) == expected
