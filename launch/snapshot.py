"""What was started, kept with the run: code (tracked files, commit, diff), resolved recipe and command.

Never the environment and never a remote's address: both hold tokens. Untracked files are named, not copied.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import logging
import shlex
import shutil
import socket
import subprocess
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

_MAX_FILE_BYTES = 1_000_000
_MAX_TOTAL_BYTES = 50_000_000
_MAX_NAMES = 1000


def save_snapshot(run_folder: Path, command: Sequence[str], resolved_config: str, *, checkout: Path) -> Path:
    """Write the next `run_folder/launch-NNNN` and return it.

    config.yaml, launch.json, and the code: code.tar.gz and changes.diff (against the commit), unless an earlier launch
    of this run holds the very same, which launch.json then names. Files over 1 MB, and what exceeds 50 MB together, are
    left out and named. Outside a git checkout there is no code to keep, and launch.json says so.
    """
    folder = _next_folder(run_folder)
    (folder / "config.yaml").write_text(resolved_config)
    facts: dict[str, Any] = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "command": shlex.join(command),
        "working_directory": str(Path.cwd()),
    }
    facts |= _save_code(folder, checkout) if _git(checkout, "rev-parse", "HEAD") else {"code": "not a git checkout"}
    (folder / "launch.json").write_text(json.dumps(facts, indent=1) + "\n")
    return folder


def _save_code(folder: Path, checkout: Path) -> dict[str, Any]:
    code = _collect(checkout)
    diff = _git(checkout, "diff", "HEAD", "--no-ext-diff", "--no-textconv", "--no-color")
    untracked = _git(checkout, "ls-files", "--others", "--exclude-standard", "-z").split("\0")[:-1]
    digest = hashlib.sha256(code.archive).hexdigest()
    facts = {
        "commit": _git(checkout, "rev-parse", "HEAD").strip(),
        "is_changed": bool(diff),
        "code_sha256": digest,
        "num_files": code.num_files,
        "left_out": code.left_out[:_MAX_NAMES],
        "untracked": untracked[:_MAX_NAMES],
    }
    earlier = _earlier_with(folder, digest)
    if earlier:
        return {"code": f"{earlier}/code.tar.gz"} | facts
    (folder / "code.tar.gz").write_bytes(code.archive)
    if len(diff) <= _MAX_FILE_BYTES:
        (folder / "changes.diff").write_text(diff)
    else:
        facts["left_out"] = ["changes.diff", *code.left_out][:_MAX_NAMES]
    return {"code": f"{folder.name}/code.tar.gz"} | facts


@dataclass(frozen=True)
class _Code:
    archive: bytes
    num_files: int
    left_out: list[str]


def _collect(checkout: Path) -> _Code:
    """Tracked files as they are on disk, in an archive that depends on nothing else (no times, no owners)."""
    buffer = io.BytesIO()
    left_out, total, num_files = [], 0, 0
    with (
        gzip.GzipFile(fileobj=buffer, mode="wb", mtime=0) as zipped,
        tarfile.open(fileobj=zipped, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for name in sorted(_git(checkout, "ls-files", "-z").split("\0")[:-1]):
            path = checkout / name
            if path.is_symlink() or not path.is_file():
                continue  # deleted, a link or a submodule: the commit has it
            size = path.stat().st_size
            if size > _MAX_FILE_BYTES or total + size > _MAX_TOTAL_BYTES:
                left_out.append(name)
                continue
            content = path.read_bytes()
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), 0o644
            archive.addfile(entry, io.BytesIO(content))
            total += size
            num_files += 1
    return _Code(buffer.getvalue(), num_files, left_out)


def _next_folder(run_folder: Path) -> Path:
    number = 1 + max((int(path.name[7:]) for path in run_folder.glob("launch-*") if path.name[7:].isdigit()), default=0)
    folder = run_folder / f"launch-{number:04d}"
    folder.mkdir(parents=True)
    return folder


def _earlier_with(folder: Path, digest: str) -> str | None:
    """Name of the launch whose code.tar.gz has this digest."""
    for path in sorted(folder.parent.glob("launch-*/launch.json"), reverse=True):
        try:
            facts = json.loads(path.read_text())
        except ValueError:
            continue  # cut short by a kill
        archive = path.parent / "code.tar.gz"
        if facts.get("code_sha256") == digest and archive.is_file():
            return path.parent.name
    return None


def _git(checkout: Path, *arguments: str) -> str:
    """Output of a git command; empty when git is missing or this is no checkout."""
    if shutil.which("git") is None:
        return ""
    result = subprocess.run(["git", "-C", str(checkout), *arguments], capture_output=True, check=False)
    if result.returncode:
        logger.debug("git %s: %s", arguments[0], result.stderr.decode(errors="replace").strip())
    return result.stdout.decode(errors="surrogateescape") if result.returncode == 0 else ""
