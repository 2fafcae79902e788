"""The registry of selection strategies, by the names used in the paper."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pixelprune.selection import Selection
from pixelprune.settings import PruneSettings

Run = Callable[[np.ndarray, PruneSettings, int], Selection]
Replay = Callable[[np.ndarray, np.ndarray, PruneSettings, int], np.ndarray]


@dataclass(frozen=True)
class Strategy:
    """One way to choose the kept blocks.

    run: (image uint8 (height, width, 3), settings, block) -> Selection.
    replay: (kept blocks (K, block, block, 3), keep (rows, cols), settings, block) -> int32 (rows, cols), the index of
        the kept block standing at each place; None where kept blocks and mask do not determine it.
    """

    name: str
    run: Run
    replay: Replay | None


_STRATEGIES: dict[str, Strategy] = {}


def register(name: str, *, replay: Replay | None = None) -> Callable[[Run], Run]:
    """Decorator: make a function available as `select(image, strategy=name)`. ValueError if the name is taken."""

    def add(run: Run) -> Run:
        if name in _STRATEGIES:
            raise ValueError(f"strategy {name!r} is registered twice: by {_STRATEGIES[name].run} and by {run}")
        _STRATEGIES[name] = Strategy(name, run, replay)
        return run

    return add


def strategy_names() -> list[str]:
    """All registered names, in order of registration."""
    _load()
    return list(_STRATEGIES)


def get_strategy(name: str) -> Strategy:
    """The strategy of that name. ValueError naming the choices if there is none."""
    if name not in _STRATEGIES:
        _load()
    if name not in _STRATEGIES:
        raise ValueError(f"prune.strategy: expected one of {', '.join(_STRATEGIES)}, got {name!r}")
    return _STRATEGIES[name]


def is_recoverable(prune: PruneSettings) -> bool:
    """True if the image can be restored exactly from kept blocks and mask (Proposition 1 of the paper)."""
    return prune.threshold == 0 and get_strategy(prune.strategy).replay is not None


def _load() -> None:
    # Imported on first use: they pull in numba, which `import pixelprune` shall not wait for.
    from pixelprune.selection import strategies  # noqa: F401
