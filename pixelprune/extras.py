"""What is not installed, in one line that names the extra which brings it."""

from __future__ import annotations

from importlib.util import find_spec

__all__ = ["require_extra"]


def require_extra(what: str, extra: str, modules: tuple[str, ...]) -> None:
    """Raise ModuleNotFoundError naming every one of `modules` that is missing and the command that installs them.

    what: the part that needs them, as the message's subject; extra: of this package's optional dependencies.
    """
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise ModuleNotFoundError(
            f"{what} needs {', '.join(missing)}: pip install 'pixelprune[{extra}]' (in the checkout: "
            f"pip install -e '.[{extra}]')",
            name=missing[0],
        )
