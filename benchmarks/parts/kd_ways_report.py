"""What the cells of `benchmarks.kd_ways` say: learning rates chosen on validation, shares of the gap, paired tests."""

import itertools
import statistics
from pathlib import Path

from benchmarks.parts.record import markdown_table

FULL, PRUNED = "none", "pred2d"
Way = tuple[str, str]
"""Recovery data, and what is learnt from it."""
PAIRS: list[tuple[Way, Way]] = [
    (("noisy", "KD"), ("noisy", "CE")),
    (("noisy", "CE + KD"), ("noisy", "CE")),
    (("bare", "teacher's answers"), ("noisy", "CE")),
    (("bare", "on-policy"), ("noisy", "CE")),
    (("noisy", "KD"), ("right", "CE")),
    (("noisy", "KD"), ("bare", "teacher's answers")),
    (("bare", "on-policy"), ("bare", "teacher's answers")),
    (("narrow", "KD"), ("narrow", "CE")),
    (("narrow", "CE + KD"), ("narrow", "CE")),
]
COLOURS = {"right": "C2", "noisy": "C3", "bare": "C0", "narrow": "C1"}


def best_lr(found: dict, way: Way) -> float:
    """The learning rate that is best on the validation split, over the seeds that tried all of them."""
    by_lr = found["ways"][way]
    tuned = set.intersection(*(set(cells) for cells in by_lr.values()))
    rates: list[float] = list(by_lr)
    return max(rates, key=lambda lr: statistics.mean(by_lr[lr][seed]["val"] for seed in tuned))


def chosen(found: dict) -> dict[Way, tuple[float, list[float]]]:
    """Way -> its best learning rate, and its test accuracies there, seed by seed."""
    lrs = {way: best_lr(found, way) for way in found["ways"]}
    return {way: (lr, [cell["test"] for cell in found["ways"][way][lr].values()]) for way, lr in lrs.items()}


def sign_flip_p(differences: list[float]) -> float:
    """Two-sided exact paired test: how many of all flips of signs give a mean as far from 0."""
    flips = itertools.product((1, -1), repeat=len(differences))
    means = [abs(statistics.mean(sign * d for sign, d in zip(signs, differences, strict=True))) for signs in flips]
    return sum(mean >= abs(statistics.mean(differences)) - 1e-12 for mean in means) / len(means)


def tables(found: dict) -> str:
    """Accuracies, and differences between ways on the same seeds, as Markdown."""
    full, free = untrained(found)
    rows = [_row("-", "Full, all tokens", None, full, full, free), _row("-", "training-free", None, free, full, free)]
    best = chosen(found)
    rows += [_row(data, way, lr, values, full, free) for (data, way), (lr, values) in best.items()]
    pairs = [_pair(one, other, best) for one, other in PAIRS if one in best and other in best]
    floor = f"\n\nWith {len(full)} seeds no p is below {2 / 2 ** len(full):.3f}." if len(full) > 1 else ""
    return markdown_table(rows) + (f"\n\n{markdown_table(pairs)}{floor}" if pairs else "")


def untrained(found: dict) -> tuple[list[float], list[float]]:
    """Test accuracies of the Full model by seed: on all tokens, and pruned without training."""
    cells = found["untrained"].values()
    return [cell[FULL] for cell in cells], [cell[PRUNED] for cell in cells]


def _pair(one: Way, other: Way, best: dict[Way, tuple[float, list[float]]]) -> dict[str, str]:
    differences = [a - b for a, b in zip(best[one][1], best[other][1], strict=True)]
    return {
        "pair": f"{one[1]} ({one[0]}) against {other[1]} ({other[0]})",
        "mean, points": f"{100 * statistics.mean(differences):+.1f}",
        "every seed": ", ".join(f"{100 * value:+.1f}" for value in differences),
        "p (sign flips)": f"{sign_flip_p(differences):.3f}" if len(differences) > 1 else "one seed: none",
    }


def _row(data: str, way: str, lr: float | None, values: list[float], full: list[float], free: list[float]) -> dict:
    gap = statistics.mean(full) - statistics.mean(free)
    back = (statistics.mean(values) - statistics.mean(free)) / gap if gap else 0.0
    spread = f" ± {statistics.stdev(values):.1%}" if len(values) > 1 else ""
    return {
        "recovery data": data,
        "way": way,
        "learning rate": "-" if lr is None else f"{lr:g}",
        "held-out accuracy": f"{statistics.mean(values):.1%}{spread}",
        "of the gap": f"{back:.0%}",
        "every seed": ", ".join(f"{value:.1%}" for value in values),
    }


def plot(found: dict, path: Path) -> None:
    """Held-out accuracy of every seed by way, between the two lines that there is a gap between."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    best, (full, free) = chosen(found), untrained(found)
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.42 * len(best)), dpi=130)
    for values, name, style in ((full, "Full, all tokens", "-"), (free, "pruned, training-free", "--")):
        axes.axvline(100 * statistics.mean(values), color="grey", linestyle=style, linewidth=1, label=name)
    for row, ((data, _), (_, values)) in enumerate(best.items()):
        points = [100 * value for value in values]
        axes.plot(points, [row] * len(points), "o", color=COLOURS[data], alpha=0.6, markersize=7)
        axes.plot([statistics.mean(points)], [row], "|", color="black", markersize=16)
    axes.set_yticks(range(len(best)), [f"{way}  ({data})" for data, way in best])
    axes.invert_yaxis()
    axes.set(xlabel="held-out accuracy of every seed, mean marked (%)", xlim=(0, 101))
    axes.grid(axis="x", alpha=0.3)
    axes.legend(frameon=False, loc="upper left")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)
