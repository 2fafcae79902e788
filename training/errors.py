"""Errors that are the user's to fix: printed as a single line, exit code 2."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)


class UserError(ValueError):
    """What is wrong, what was expected, what came, and which setting to change, in one line."""


class StopAskedError(Exception):
    """All ranks agreed, in the midst of preparations, to end the run: somebody asked it to stop."""


class RankError(UserError):
    """One that this rank alone may have met (out of memory, a disk): every rank prints its own."""


@contextmanager
def side_write(what: str, *, go_on: bool) -> Iterator[None]:
    """For what tells of a run and is not the run: one line says that the disk did not take it.

    go_on: whether the run outlives that (checkpoint.on_error=continue). Raises RankError if not.
    """
    try:
        yield
    except OSError as error:
        line = f"{error.filename or what}: {what} cannot be written: {error.strerror or error}"
        if not go_on:
            raise RankError(f"{line} (free space, or go on without it with checkpoint.on_error=continue)") from error
        logger.error("%s; going on without it (checkpoint.on_error=continue)", line)


def need(holds: bool, message: str) -> None:
    """Raises UserError(message) unless `holds`."""
    if not holds:
        raise UserError(message)
