"""Environments of the peers: each pins what it needs, and takes torch and whatever else agrees from this one.

They cannot share one: the peers ask for three ranges of transformers. torch is gigabytes in its other builds, so an
environment looks into this one's packages behind its own. `--no-deps`: the pinned lists are whole.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

REQUIREMENTS = Path(__file__).parent / "requirements"
ENVIRONMENTS = tuple(sorted(path.stem for path in REQUIREMENTS.glob("*.txt")))
OURS = "ours"
PINNED = "requirements.txt"
"""In an environment: the list that it was made from, written last."""


def python_of(name: str, folder: Path) -> Path | None:
    """The interpreter of an environment; None where it was not made, or from another list than today's."""
    if name == OURS:
        return Path(sys.executable)
    made = folder / name / PINNED
    is_made = made.exists() and made.read_text() == (REQUIREMENTS / f"{name}.txt").read_text()
    return folder / name / "bin" / "python" if is_made else None


def make(name: str, folder: Path) -> None:
    """Make an environment anew. Raises CalledProcessError where pip fails; it says why."""
    path = folder / name
    shutil.rmtree(path, ignore_errors=True)
    venv.create(path, with_pip=True)
    python = path / "bin" / "python"
    own = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    (Path(own.stdout.strip()) / "base.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pinned = REQUIREMENTS / f"{name}.txt"
    install = [python, "-m", "pip", "install", "--quiet", "--no-compile", "--no-deps", "-r", pinned]
    subprocess.run(install, check=True)
    (path / PINNED).write_text(pinned.read_text())
