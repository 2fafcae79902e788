"""The one base of all errors that are the user's to mend: printed as a single line, exit code 2."""


class UserError(ValueError):
    """What is wrong, what was expected, what came, and which setting to change, in one line."""
