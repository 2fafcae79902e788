"""What a run was made of: package versions and the state of the source tree. No environment variables, no secrets."""

from __future__ import annotations

import json
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = (
    "pixelprune",
    "torch",
    "transformers",
    "deepspeed",
    "accelerate",
    "flash-attn",
    "liger-kernel",
    "numpy",
    "pillow",
)


def describe_provenance() -> str:
    """JSON of versions and git state, saved with every checkpoint."""
    facts = {
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "git": _git_state(Path(__file__).parent),
    }
    return json.dumps(facts, indent=2) + "\n"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _git_state(folder: Path) -> dict[str, str | bool] | None:
    """Commit and whether files differ from it; None outside a checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "modified": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None
