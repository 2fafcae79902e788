"""Several hosts: DeepSpeed's hostfile, started over ssh from one of them, or node by node without ssh (Slurm)."""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path

from launch.environment import OF_EVERY_RANK
from launch.local import QUIET, TRAINER, find_deepspeed
from training.errors import UserError

_EXPORTED = ("GLOO_", "HF_", "WANDB_")
"""Beginnings of the names that other hosts get beside what DeepSpeed hands over (NCCL, PYTHON and a few)."""
_SECRET = re.compile("KEY|TOKEN|SECRET|PASSW")
_ALIVE_SECONDS = 15
"""Between two questions of ssh whether a host is there."""
_LINE = re.compile(r"(\S+)\s+slots=(\d+)\s*$")


def read_hostfile(path: Path) -> dict[str, int]:
    """Host -> number of ranks on it, in the order of the file (`name slots=8` per line). Raises UserError."""
    if not path.is_file():
        raise UserError(f"--hostfile {path}: no such file")
    hosts: dict[str, int] = {}
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        text = line.split("#")[0].strip()
        if not text:
            continue
        match = _LINE.match(text)
        if match is None or int(match[2]) < 1:
            raise UserError(f"{path}:{number}: expected `hostname slots=8`, got {line.strip()!r}")
        if match[1] in hosts:
            raise UserError(f"{path}:{number}: host {match[1]} is named twice")
        hosts[match[1]] = int(match[2])
    if not hosts:
        raise UserError(f"{path}: expected one line `hostname slots=8` per host, got none")
    return hosts


def hostfile_command(recipe: Path, overrides: list[str], hostfile: Path, *, port: int) -> list[str]:
    """DeepSpeed starts the ranks of all hosts over ssh (pdsh)."""
    options = ["--hostfile", str(hostfile), "--launcher", "pdsh", "--master_port", str(port)]
    return [find_deepspeed(), *QUIET, *options, "--module", TRAINER, str(recipe), *overrides]


def with_exports(environment: dict[str, str], folder: Path) -> dict[str, str]:
    """`environment` with DS_ENV_FILE: a file in the run's folder of what the ranks of all hosts are to get of it.

    DeepSpeed writes these variables into the remote command line, where every user of a host can read them, and into
    its log: secrets stay here. What the user's own .deepspeed_env says comes last and wins.
    """
    lines = []
    for name, value in environment.items():
        if name in OF_EVERY_RANK or (name.startswith(_EXPORTED) and not _SECRET.search(name)):
            # One line each, and pdsh fills in `%h` and its like.
            if "\n" in value or "%" in value:
                raise UserError(f"{name}: cannot be handed to other hosts with a line break or % in it: {value!r}")
            # DeepSpeed puts double quotes around what the shell would split, but escapes nothing within.
            lines.append(f"{name}=" + re.sub(r'([\\"$`])', r"\\\1", value))
    own = environment.get("DS_ENV_FILE", ".deepspeed_env")
    for place in (Path.home(), Path.cwd()):
        if (place / own).is_file():
            lines += (place / own).read_text().splitlines()
    folder.mkdir(parents=True, exist_ok=True)
    path = (folder / "exported.env").resolve()
    path.touch(mode=0o600)
    path.write_text("".join(f"{line}\n" for line in dict.fromkeys(lines) if line.strip()))
    return environment | {"DS_ENV_FILE": str(path)}


def with_lost_hosts_found(environment: dict[str, str], timeout_minutes: float) -> dict[str, str]:
    """`environment` in which ssh gives a host up that answers no more, some time after collectives have.

    Without, it waits for the answer for ever, and with it the front process: nothing would start the run again. A
    cable that is back before the collectives give up is none of its business, so its patience is the longer one.
    The user's own arguments come first, and of an option ssh takes the first.
    """
    tries = math.ceil(60 * timeout_minutes / _ALIVE_SECONDS) + 2
    ours = f"-oServerAliveInterval={_ALIVE_SECONDS} -oServerAliveCountMax={tries}"
    own = environment.get("PDSH_SSH_ARGS_APPEND", "")
    return environment | {"PDSH_SSH_ARGS_APPEND": f"{own} {ours}".strip()}


def check_ssh_tools() -> None:
    """Raises UserError when what the hostfile's way needs is not installed."""
    if shutil.which("pdsh") is None:
        raise UserError(
            "--hostfile: no `pdsh` on PATH, which DeepSpeed starts other hosts with; install it on this host"
        )


def node_command(
    recipe: Path, overrides: list[str], hostfile: Path, *, node_rank: int, master: str, port: int
) -> list[str]:
    """One node's part of a run that is started on every node, by Slurm or by hand: no ssh."""
    options = ["--hostfile", str(hostfile), "--no_ssh", "--node_rank", str(node_rank)]
    meeting_point = ["--master_addr", master, "--master_port", str(port)]
    return [find_deepspeed(), *QUIET, *options, *meeting_point, "--module", TRAINER, str(recipe), *overrides]


def parse_master(text: str) -> tuple[str, int]:
    """`address:port`, the same on all nodes. Raises UserError."""
    address, colon, port = text.rpartition(":")
    if not colon or not address or not port.isdigit():
        raise UserError(f"--master: expected address:port as in node01:29500, got {text!r}")
    return address, int(port)
