"""Which class serves, asked in a worker: a module of its own, so that other processes can import it by name."""

from __future__ import annotations


def class_of(model: object) -> str:
    return f"{type(model).__module__}.{type(model).__name__}"
