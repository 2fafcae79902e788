"""The paper's tables as grids: which rows each has, and what a row asks of an evaluation pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

PIXELPRUNE = "pred2d"
THRESHOLDS = (0.0, 0.01, 0.02, 0.05, 0.1)


@dataclass(frozen=True)
class Row:
    """One line of a table.

    role: which of the models given by name answers. strategy: "none" is Full. Metric and threshold belong to it.
    depth: the layer of the vision tower behind which blocks are dropped; None for before it, without hooks.
    """

    label: str
    role: str = "base"
    strategy: str = "none"
    metric: str = "max"
    threshold: float = 0.0
    depth: int | None = None


@dataclass(frozen=True)
class TablePlan:
    """One table of the paper: its number there, what it shows, its rows, and whether it compares FLOPs."""

    number: int
    title: str
    rows: tuple[Row, ...]
    shows_flops: bool = False

    @property
    def roles(self) -> list[str]:
        """Names of the models it needs, in order."""
        return list(dict.fromkeys(row.role for row in self.rows))


FULL, PRUNED = Row("Full"), Row("PixelPrune", strategy=PIXELPRUNE)
_BASELINES = (Row("Resize", strategy="resize"), Row("Random", strategy="random"), Row("ConnComp", strategy="conncomp"))

TABLES = {
    "documents": TablePlan(
        1, "Documents, training-free, every method at PixelPrune's budget", (FULL, *_BASELINES, PRUNED)
    ),
    "distillation": TablePlan(
        2, "Documents with knowledge distillation", (FULL, PRUNED, Row("PixelPrune + KD", "kd", PIXELPRUNE))
    ),
    "grounding": TablePlan(
        3,
        "GUI grounding, trained -> asked",
        (
            Row("Full -> Full", "full"),
            Row("PixelPrune -> PixelPrune", "pruned", PIXELPRUNE),
            Row("PixelPrune -> Full", "pruned"),
        ),
    ),
    "strategies": TablePlan(
        6,
        "Selection strategies",
        (
            FULL,
            Row("Raster", strategy="raster"),
            Row("Serpentine", strategy="serpentine"),
            Row("Pred-2D", strategy="pred2d"),
        ),
    ),
    "depth": TablePlan(7, "Depth at which blocks are dropped", (FULL,), shows_flops=True),
    "thresholds": TablePlan(
        8,
        "Metric and threshold of the omission test",
        (
            FULL,
            PRUNED,
            *(
                Row(f"{metric}, {threshold:g}", strategy=PIXELPRUNE, metric=metric, threshold=threshold)
                for metric in ("max", "mae")
                for threshold in THRESHOLDS
                if threshold
            ),
        ),
    ),
    "qwen3_5": TablePlan(10, "Documents with Qwen3.5", (FULL, PRUNED)),
    "general": TablePlan(12, "General-domain benchmarks", (FULL, PRUNED)),
}
"""By name. At threshold 0 both metrics ask for equality, so that row stands once; rows of `depth`: see `depth_rows`."""


def depth_rows(depths: Sequence[int]) -> tuple[Row, ...]:
    """Table 7's rows: PixelPrune's blocks dropped behind each of these layers, -1 before the first."""
    return tuple(
        Row("before the tower" if depth == -1 else f"after layer {depth}", strategy=PIXELPRUNE, depth=depth)
        for depth in depths
    )
