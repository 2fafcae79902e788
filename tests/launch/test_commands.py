"""The exact commands, the environment of ranks, and the one-line answers to mistakes."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from launch.__main__ import main
from launch.environment import rank_environment
from launch.hosts import read_hostfile
from launch.local import default_num_ranks, local_command
from training.errors import UserError
from training.loop.folder_lock import FolderLock

RECIPE = "configs/debug.yaml"


@pytest.fixture(autouse=True)
def _no_gpus_chosen(monkeypatch):
    monkeypatch.setattr(
        "launch.__main__._check", lambda *_, **__: 0
    )  # what a dry run looks at is tried in test_dry_run
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_dry_run_prints_the_command_of_a_local_run(capsys):
    assert main([RECIPE, "optim.lr=2e-5", "--ranks", "3", "run.name=a b", "--dry-run"]) == 0
    command = shlex.split(capsys.readouterr().out)
    assert Path(command[0]).name == "deepspeed"
    options = ["--num_accelerators", "3", "--module", "training.train"]
    assert command[1:3] == ["--log_level", "critical"]
    assert command[3:] == [*options, RECIPE, "optim.lr=2e-5", "run.name=a b"]


def test_accepting_changes_is_a_setting_of_the_run(capsys):
    assert main([RECIPE, "--ranks", "1", "--accept-changes", "--dry-run"]) == 0
    assert capsys.readouterr().out.rstrip().endswith("run.accept_changes=true")


def test_dry_run_prints_the_commands_of_several_hosts(capsys, tmp_path):
    hostfile = tmp_path / "hosts"
    hostfile.write_text("one slots=8\ntwo slots=4 # smaller\n\n")
    assert main([RECIPE, "--hostfile", str(hostfile), "--dry-run"]) == 0
    over_ssh = shlex.split(capsys.readouterr().out)
    assert over_ssh[3:7] == ["--hostfile", str(hostfile), "--launcher", "pdsh"]
    assert over_ssh[-3:] == ["--module", "training.train", RECIPE]
    node = ["--node-rank", "1", "--master", "one:29500"]
    assert main([RECIPE, "--hostfile", str(hostfile), *node, "--dry-run"]) == 0
    by_node = shlex.split(capsys.readouterr().out)
    assert by_node[5:] == [
        *("--no_ssh", "--node_rank", "1", "--master_addr", "one", "--master_port", "29500"),
        *("--module", "training.train", RECIPE),
    ]


def test_gpus_left_to_the_run_are_the_ones_it_takes(monkeypatch):
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5,7")
    assert local_command(Path(RECIPE), [], 2)[3:5] == ["--include", "localhost:2,5"]
    with pytest.raises(UserError, match="leaves 3 GPUs"):
        local_command(Path(RECIPE), [], 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8932f937")
    with pytest.raises(UserError, match="expected GPU numbers"):
        local_command(Path(RECIPE), [], 1)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert local_command(Path(RECIPE), [], 4)[3:5] == ["--num_accelerators", "4"]


def test_more_ranks_than_gpus_are_refused_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    assert main([RECIPE, "--ranks", "3", "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert error == "error: --ranks 3: this machine has 2 GPUs; lower --ranks, or set DS_ACCELERATOR=cpu\n"
    assert local_command(Path(RECIPE), [], 2)[3:5] == ["--num_accelerators", "2"]
    assert default_num_ranks() == 2
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert local_command(Path(RECIPE), [], 3)[3:5] == ["--num_accelerators", "3"]
    assert default_num_ranks() == min(2, os.cpu_count() or 1)


def test_ranks_share_the_cores_unless_the_user_says_otherwise(monkeypatch):
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(32)))
    environment = rank_environment(4)
    assert environment["OMP_NUM_THREADS"] == environment["MKL_NUM_THREADS"] == "8"
    assert rank_environment(64)["OMP_NUM_THREADS"] == "1"
    assert rank_environment(4, threads_per_rank=3)["OMP_NUM_THREADS"] == "3"
    assert "RANK" not in environment
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert rank_environment(4)["OMP_NUM_THREADS"] == "5"
    assert rank_environment(4, threads_per_rank=3)["OMP_NUM_THREADS"] == "3"  # the recipe's word is the last


def test_hidden_gpus_stay_hidden(monkeypatch):
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert rank_environment(2)["DS_ACCELERATOR"] == "cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert "DS_ACCELERATOR" not in rank_environment(2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("one\n", "hosts:1: expected `hostname slots=8`, got 'one'"),
        ("one slots=0\n", "hosts:1: expected"),
        ("one slots=1\none slots=2\n", "hosts:2: host one is named twice"),
        ("# nobody\n", "got none"),
    ],
)
def test_mistakes_in_a_hostfile_name_the_line(tmp_path, content, message):
    path = tmp_path / "hosts"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        read_hostfile(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--node-rank", "0"], "belong to a --hostfile"),
        (["--hostfile", "nowhere"], "no such file"),
        (["--ranks", "0"], "--ranks: expected at least 1, got 0"),
        (["--slurm", "--ranks", "2"], "drop --hostfile and --ranks"),
        (["optim.lrr=3"], "did you mean 'optim.lr'"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line_and_code_two(capsys, arguments, message):
    assert main([RECIPE, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_missing_launcher_is_one_line(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert main([RECIPE, "--ranks", "1", "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: no `deepspeed` on PATH")
    assert error.count("\n") == 1


def test_second_run_in_a_folder_is_refused_with_pid_and_host(tmp_path):
    holder = subprocess.Popen(
        [
            *(sys.executable, "-c"),
            "import sys, time; from pathlib import Path; from training.loop.folder_lock import FolderLock\n"
            "lock = FolderLock(Path(sys.argv[1])).acquire(); print('locked', flush=True); time.sleep(600)",
            str(tmp_path),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout.readline() == "locked\n"
    with pytest.raises(UserError, match=f"another run has this folder.*pid {holder.pid} on {os.uname().nodename}"):
        FolderLock(tmp_path).acquire()
    holder.kill()
    holder.wait()
    with FolderLock(tmp_path):
        assert f"pid {os.getpid()} " in (tmp_path / "launch.lock").read_text()
    with FolderLock(tmp_path):
        pass


def test_a_run_whose_folder_cannot_be_made_names_the_settings(tmp_path):
    (tmp_path / "runs").touch()
    with pytest.raises(UserError, match=r"runs/mine: expected a folder .*run\.folder, run\.name.*: Not a directory"):
        FolderLock(tmp_path / "runs" / "mine").acquire()


def test_the_recipe_the_demo_ends_with_fits_a_published_model():
    from launch.demo import NEXT_COMMAND
    from training.config.recipe import load_recipe

    module, recipe, *overrides = shlex.split(NEXT_COMMAND)
    config = load_recipe(Path(recipe), overrides)
    assert module == "launch"
    assert config.optim.lr <= 1e-4
    assert config.model.dtype == "bfloat16"
    # Qwen3-VL's preprocessor_config.json: {"size": {"shortest_edge": 65536, "longest_edge": 16777216}}
    assert (config.resize.min_pixels, config.resize.max_pixels) == (65536, 16777216)
    assert config.schedule.max_steps == 0
    assert config.schedule.epochs <= 3
