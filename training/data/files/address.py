"""Which remote addresses a recipe may name.

An address is the user's, written in the recipe; a record never names one. Its scheme is in SCHEMES, it chains no file
systems (`::`) and holds no credentials: these belong into the environment or the file system's own configuration, while
an address stands in logs, recipes and trackers.
"""

from __future__ import annotations

import re

__all__ = ["SCHEMES", "check_address", "is_remote"]

SCHEMES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "hf": "huggingface_hub"}
"""Scheme of an address -> the package that fsspec needs for it."""
_SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*)://")


def is_remote(path: str) -> bool:
    """Whether a path is an address."""
    return _SCHEME.match(path) is not None or "::" in path


def check_address(address: str, key: str) -> None:
    """Raises ValueError for an address that is not read; what may be a secret in it is not repeated. key: the knob."""
    found = _SCHEME.match(address)
    scheme = found.group(1).lower() if found else ""
    if "::" in address:
        raise ValueError(f"{key}: an address that chains file systems (::), expected one of {', '.join(SCHEMES)}")
    if scheme not in SCHEMES:
        raise ValueError(
            f"{key}: an address of scheme {scheme!r}, expected {', '.join(SCHEMES)} or a local path to copy it to"
        )
    host = address[len(scheme) + 3 :].partition("/")[0]
    if "@" in host or "?" in address or "#" in address:
        raise ValueError(
            f"{key}: a {scheme}:// address with '@' before its path, '?' or '#', which may be credentials; give "
            "them in the environment or the file system's configuration"
        )
    if ".." in address.split("/"):
        raise ValueError(f"{key}: a {scheme}:// address with '..'")
