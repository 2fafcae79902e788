"""What reaches the ranks of other hosts, through the real DeepSpeed runner and a stand-in for pdsh."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from launch.environment import rank_environment
from launch.hosts import hostfile_command, with_exports, with_lost_hosts_found
from training.errors import UserError

ASKED = {
    "GLOO_SOCKET_IFNAME": "ib0",
    "HF_HOME": "/data/my hub",
    "WANDB_NOTES": 'costs $5, `date`, "quoted" \\ back',
    "WANDB_API_KEY": "secret-1",
    "HF_TOKEN": "secret-2",
    "UNRELATED": "stays",
}


@pytest.fixture
def tools(tmp_path) -> Path:
    """A folder with `pdsh`, which keeps the command line of the other hosts, and `ssh`, which finds any host."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, script in (("pdsh", f'shift 5; echo "$@" > {tmp_path}/remote.sh'), ("ssh", "echo 127.0.0.1")):
        (folder / name).write_text(f"#!/bin/bash\n{script}\n")
        (folder / name).chmod(0o755)
    return folder


def test_other_hosts_get_the_environment_without_secrets(tmp_path, tools, monkeypatch):
    for name, value in ASKED.items():
        monkeypatch.setenv(name, value)
    for name in ("OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setenv("DS_ENV_FILE", str(tmp_path / "own.env"))
    (tmp_path / "own.env").write_text("\nMY_OWN=7\n")
    hostfile = tmp_path / "hosts"
    hostfile.write_text("one slots=2\ntwo slots=2\n")
    environment = with_exports(rank_environment(2, threads_per_rank=3), tmp_path / "run")
    assert (tmp_path / "run" / "exported.env").stat().st_mode & 0o777 == 0o600
    command = hostfile_command(Path("recipe.yaml"), [], hostfile, port=29500)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    remote = (tmp_path / "remote.sh").read_text()
    assert "secret" not in remote + done.stdout + done.stderr
    shown = subprocess.run(
        ["bash", "-c", remote.partition(" cd ")[0] + " env -0"], env={}, capture_output=True, text=True, check=True
    )
    arrived = dict(line.split("=", 1) for line in shown.stdout.split("\0") if line)
    expected = {name: ASKED[name] for name in ("GLOO_SOCKET_IFNAME", "HF_HOME", "WANDB_NOTES")}
    expected |= {"OMP_NUM_THREADS": "3", "TOKENIZERS_PARALLELISM": "false", "MY_OWN": "7"}
    assert expected == {name: arrived.get(name) for name in expected}
    assert "UNRELATED" not in arrived


def test_a_value_that_does_not_fit_a_line_is_refused(tmp_path):
    with pytest.raises(UserError, match="WANDB_NOTES: cannot be handed to other hosts"):
        with_exports({"WANDB_NOTES": "two\nlines"}, tmp_path)


def test_ssh_gives_a_lost_host_up_after_the_collectives_have():
    assert (
        with_lost_hosts_found({}, 30.0)["PDSH_SSH_ARGS_APPEND"] == "-oServerAliveInterval=15 -oServerAliveCountMax=122"
    )
    own = {"PDSH_SSH_ARGS_APPEND": "-q -oServerAliveInterval=5"}
    found = with_lost_hosts_found(own, 0.5)["PDSH_SSH_ARGS_APPEND"]
    assert found == "-q -oServerAliveInterval=5 -oServerAliveInterval=15 -oServerAliveCountMax=4"
