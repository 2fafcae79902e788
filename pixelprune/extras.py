"""What is not installed, or too old, in one line that names what brings it."""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec

__all__ = ["INFERENCE", "TRAINING", "require_extra", "require_transformers"]

INFERENCE = "5.19"
"""The vision tower takes precomputed geometry, and `generate` takes encoded images."""
TRAINING = "5.20"
"""What the forward of packed rows was tested with, and `generate` with a chunked prefill."""


def require_extra(what: str, extra: str, modules: tuple[str, ...]) -> None:
    """Raise ModuleNotFoundError naming every one of `modules` that is missing and the command that installs them.

    what: the part that needs them, as the message's subject; extra: of this package's optional dependencies.
    """
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise ModuleNotFoundError(
            f"{what} needs {', '.join(missing)}: pip install 'pixelprune[{extra}]' (in the checkout: `make install`, "
            "then `source .venv/bin/activate`)",
            name=missing[0],
        )


@lru_cache
def require_transformers(minimum: str, what: str) -> None:
    """Raise ImportError naming the installed and the needed version where transformers is older than `minimum`."""
    import transformers
    from packaging.version import Version

    if Version(transformers.__version__) < Version(minimum):
        raise ImportError(
            f"{what} needs transformers >= {minimum}, got {transformers.__version__}: pip install "
            f"'transformers>={minimum}' (vLLM serves in an environment of its own, docs/serving.md)"
        )
