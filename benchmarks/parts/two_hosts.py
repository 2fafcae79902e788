"""Two hosts on one machine: network namespaces joined by a cable (veth), each with its own sshd.

Needs root, `ip`, `sshd`, `ssh-keygen`, `pdsh` and `unshare`. Everything lives in a mount namespace of its own
(`enter_own_mounts`): keys and addresses cover those of the user for this process and its children alone, and all of it
is gone when the process ends.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

NAMES = ("left", "right")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
DEVICE = "cable0"
NEEDED = ("ip", "sshd", "ssh", "ssh-keygen", "pdsh", "unshare", "mount")
_INSIDE = "--in-own-mounts"
_SSHD = """
Port 22
ListenAddress {address}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
PidFile none
UsePAM no
StrictModes no
PasswordAuthentication no
PermitRootLogin prohibit-password
LogLevel ERROR
"""
_SSH = """
Host *
    IdentityFile {folder}/key
    StrictHostKeyChecking no
    UserKnownHostsFile /dev/null
    LogLevel ERROR
"""


def why_not() -> str:
    """What this machine lacks for two hosts; empty if it has all."""
    missing = [name for name in NEEDED if _tool(name) is None]
    if missing:
        return f"no {', '.join(missing)}"
    if os.geteuid() != 0:
        return "not root"
    trial = subprocess.run(
        ["unshare", "--mount", "--net", "ip", "link", "add", "try0", "type", "veth", "peer", "name", "try1"],
        capture_output=True,
        text=True,
        check=False,
    )
    return "" if trial.returncode == 0 else f"no network namespaces ({trial.stderr.strip()})"


def enter_own_mounts(module: str) -> None:
    """Run `python -m module` with these arguments once more, in mounts of its own, and end with its code."""
    if _INSIDE in sys.argv:
        sys.argv.remove(_INSIDE)
        return
    command = ["unshare", "--mount", "--propagation", "private", sys.executable, "-m", module, *sys.argv[1:], _INSIDE]
    raise SystemExit(subprocess.run(command, check=False).returncode)


class TwoHosts:
    """Both hosts, from their start to their end; a context manager, to be used in mounts of its own."""

    def __init__(self, folder: Path):
        """folder: for keys and logs."""
        self.folder = folder
        self._daemons: list[subprocess.Popen] = []

    def __enter__(self) -> TwoHosts:
        self._make_keys()
        Path("/run/netns").mkdir(exist_ok=True)
        _run("mount", "-t", "tmpfs", "none", "/run/netns")  # where names of namespaces lie: none of ours stays behind
        for name in NAMES:
            _run("ip", "netns", "add", name)
        _run("ip", "link", "add", DEVICE, "netns", NAMES[0], "type", "veth", "peer", "name", DEVICE, "netns", NAMES[1])
        Path("/run/sshd").mkdir(exist_ok=True)
        for name, address in zip(NAMES, ADDRESSES, strict=True):
            _run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", DEVICE)
            for device in ("lo", DEVICE):
                _run("ip", "-n", name, "link", "set", device, "up")
            settings = self.folder / f"sshd_{name}"
            settings.write_text(_SSHD.format(folder=self.folder, address=address))
            self._daemons.append(self.start(name, [str(_tool("sshd")), "-D", "-e", "-f", str(settings)]))
        self._wait_for_ssh()
        return self

    def __exit__(self, *_: object) -> None:
        for name in NAMES:
            self.kill_all(name)
        for daemon in self._daemons:
            daemon.wait()
        for name in NAMES:
            _run("ip", "netns", "del", name)

    def start(self, name: str, command: Sequence[str], **options: object) -> subprocess.Popen:
        """A process on one of the hosts."""
        return subprocess.Popen(["ip", "netns", "exec", name, *command], **options)  # type: ignore[call-overload]

    def processes(self, name: str) -> list[int]:
        """Pids of what runs on a host, but sshd and its sessions: a lost client's stay until TCP gives up."""
        return [pid for pid in _pids(name) if not _is_sshd(pid)]

    def kill_all(self, name: str) -> None:
        """The host loses power: everything on it ends at once, its sshd with it."""
        daemon = self._daemons[NAMES.index(name)]
        while pids := _pids(name):
            for pid in pids:
                _kill(pid)
            daemon.poll()
            time.sleep(0.05)

    def cut(self, *, again: bool = False) -> None:
        """Pull the cable; again: put it back."""
        _run("ip", "-n", NAMES[0], "link", "set", DEVICE, "up" if again else "down")

    def _make_keys(self) -> None:
        for name in ("key", "host_key"):
            _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / name))
        home = self.folder / "ssh"
        home.mkdir()
        (home / "config").write_text(_SSH.format(folder=self.folder))
        (home / "config").chmod(0o600)
        own = Path("~root/.ssh").expanduser()
        own.mkdir(mode=0o700, exist_ok=True)
        _run("mount", "--bind", str(home), str(own))

    def _wait_for_ssh(self) -> None:
        for name, address in zip(NAMES, reversed(ADDRESSES), strict=True):
            while self.start(name, ["ssh", address, "true"]).wait() != 0:
                if any(daemon.poll() is not None for daemon in self._daemons):
                    raise RuntimeError("a host's sshd has ended; its words are above")
                time.sleep(0.2)


def _tool(name: str) -> str | None:
    """Daemons lie where a user's PATH often does not look."""
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")


def _run(*command: str) -> None:
    subprocess.run([_tool(command[0]) or command[0], *command[1:]], check=True)


def _pids(name: str) -> list[int]:
    text = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=True).stdout
    return list(map(int, text.split()))


def _is_sshd(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/comm").read_text().startswith("sshd")
    except (FileNotFoundError, ProcessLookupError):
        return True  # gone


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, os.WNOHANG)
    except (ProcessLookupError, ChildProcessError):
        return
