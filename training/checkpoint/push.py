"""An export to the Hugging Face hub, through huggingface_hub and under its login; no token passes through here."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

from training.errors import UserError

_CLIENTS = tuple(base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception))
_REFUSALS: tuple[type[Exception], ...] = (HfHubHTTPError, *_CLIENTS, OSError)
"""Of the hub, and of the HTTP client below it, whose own base error is among them, whichever it is (httpx, httpx2)."""
_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def check_push(name: str) -> None:
    """Whether the hub can be pushed to, before a long export: UserError for no OWNER/NAME, no login, no hub."""
    if not _NAME.fullmatch(name):
        raise UserError(f"--push: expected OWNER/NAME, got {name!r}")
    try:
        HfApi().whoami()
    except LocalTokenNotFoundError as error:
        raise UserError("--push: not logged in to the hub; run `hf auth login` first") from error
    except _REFUSALS as error:
        raise UserError(f"--push: the hub does not know this login or is not reached: {_first_line(error)}") from error


def push_folder(folder: Path, name: str, *, public: bool = False) -> str:
    """Upload an export as one commit; returns the address of it. A repository that is not there is made.

    public: of a new repository; others are private, and an existing one stays what it is.
    Raises UserError for what the hub refuses.
    """
    api = HfApi()
    try:
        api.create_repo(name, private=not public, exist_ok=True)
        commit = api.upload_folder(repo_id=name, folder_path=folder, commit_message=f"Export of {folder.name}")
    except _REFUSALS as error:
        raise UserError(f"--push {name}: {_first_line(error)} (the export is whole in {folder})") from error
    return str(commit.commit_url)


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
