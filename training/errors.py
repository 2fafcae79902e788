"""Errors that are the user's to fix: printed as a single line, exit code 2."""


class UserError(ValueError):
    """What is wrong, what was expected, what came, and which setting to change, in one line."""


class StopAskedError(Exception):
    """All ranks agreed, in the midst of preparations, to end the run: somebody asked it to stop."""


class RankError(UserError):
    """One that this rank alone may have met (out of memory, a disk): every rank prints its own."""


def need(holds: bool, message: str) -> None:
    """Raises UserError(message) unless `holds`."""
    if not holds:
        raise UserError(message)
