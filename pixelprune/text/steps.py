"""Work that pauses between its stages, so that the same stage of many pieces can be done in a row.

A stage whose code and tables are in the processor's cache takes half the time of one that comes after all others of
a record: short records are prepared stage by stage for that reason alone, and to the same result.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from functools import wraps
from typing import ParamSpec, TypeVar

__all__ = ["Steps", "all_at_once", "finished"]

P = ParamSpec("P")
T = TypeVar("T")

Steps = Generator[None, None, T]
"""Pauses wherever others may go on; returns what was worked at."""


def finished(steps: Steps[T]) -> T:
    """All stages, one behind the other. Raises what they raise."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: T = end.value
            return result


def all_at_once(steps: Callable[P, Steps[T]]) -> Callable[P, T]:
    """The same work without pauses."""

    @wraps(steps)
    def work(*args: P.args, **kwargs: P.kwargs) -> T:
        return finished(steps(*args, **kwargs))

    return work
