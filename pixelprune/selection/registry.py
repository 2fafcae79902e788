"""Every selection strategy, by the name used in the paper: the built-in ones as a table, a user's own by `register`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pixelprune.selection import baselines, strategies
from pixelprune.selection.selection import Selection
from pixelprune.settings import PruneSettings

__all__ = ["BUILT_IN", "Strategy", "get_strategy", "is_in_time", "is_recoverable", "register", "strategy_names"]

Run = Callable[[np.ndarray, PruneSettings, int], Selection]
Replay = Callable[[np.ndarray, np.ndarray, PruneSettings, int], np.ndarray]


@dataclass(frozen=True)
class Strategy:
    """One way to choose the kept blocks.

    run: (image uint8 (height, width, 3), settings, block) -> Selection.
    in_time: the images of a conversation are looked at together (`pixelprune.sessions`); run and replay are those of an
        image without a neighbour in time.
    replay: (kept blocks (K, block, block, 3), keep (rows, cols), settings, block) -> int32 (rows, cols), the index of
        the kept block standing at each place; None where kept blocks and mask do not determine it.
    """

    name: str
    run: Run
    replay: Replay | None
    in_time: bool = False


BUILT_IN = (
    Strategy("none", strategies.none, strategies.replay_none),
    Strategy("pred2d", strategies.pred2d, strategies.replay_pred2d),
    Strategy("pred3d", strategies.pred2d, strategies.replay_pred2d, in_time=True),
    Strategy("raster", strategies.raster, strategies.replay_raster),
    Strategy("serpentine", strategies.serpentine, strategies.replay_serpentine),
    Strategy("random", baselines.random, None),
    Strategy("conncomp", baselines.conncomp, None),
    Strategy("conncomp_cover", baselines.conncomp_cover, None),
    Strategy("resize", baselines.resize, None),
)

_STRATEGIES = {strategy.name: strategy for strategy in BUILT_IN}


def register(name: str, *, replay: Replay | None = None) -> Callable[[Run], Run]:
    """Decorator: make a function available as `select(image, strategy=name)`. ValueError if the name is taken."""

    def add(run: Run) -> Run:
        if name in _STRATEGIES:
            raise ValueError(f"strategy {name!r} is registered twice: by {_STRATEGIES[name].run} and by {run}")
        _STRATEGIES[name] = Strategy(name, run, replay)
        return run

    return add


def strategy_names() -> list[str]:
    """All names: the built-in ones in the order of the paper, then a user's own in order of registration."""
    return list(_STRATEGIES)


def get_strategy(name: str) -> Strategy:
    """The strategy of that name. ValueError naming the choices if there is none."""
    if name not in _STRATEGIES:
        raise ValueError(f"prune.strategy: expected one of {', '.join(_STRATEGIES)}, got {name!r}")
    return _STRATEGIES[name]


def is_recoverable(prune: PruneSettings) -> bool:
    """True if images can be restored exactly from kept blocks and masks (Proposition 1 of the paper)."""
    return prune.threshold == 0 and get_strategy(prune.strategy).replay is not None


def is_in_time(prune: PruneSettings) -> bool:
    """True if what is kept of an image depends on the others of its conversation."""
    strategy = get_strategy(prune.strategy)
    return strategy.in_time or (prune.budget == "pred3d" and prune.strategy in baselines.AT_BUDGET)
