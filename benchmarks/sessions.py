"""What is kept of the screenshots of sessions: by kind of step, in windows, under the actions; and what choosing costs.

    python -m benchmarks.sessions [--repeats 9] [--folder data_tools/session_samples] [--picture FILE]

Ways: Full (every block), pred2d (each screenshot by itself), backward, forward, forward with keep_replaced, and a
control: forward from a screenshot of a strange session, the next one in the file that has one of this size. Kept blocks
are sums over steps or windows. A step is a pair of screenshots of one size; forward counts the later one of the pair,
backward the earlier. FLOPs are those of a training step of Qwen3-VL-2B on the record that `data_tools sessions` writes
of the window, its last action supervised; its text is counted at four characters a token.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.parts.record import markdown_table, write_record
from benchmarks.parts.shapes import shape_config
from benchmarks.parts.walked import SAMPLES, Walked, read_walked
from pixelprune.flops import CostModel
from pixelprune.selection import select
from pixelprune.sessions import SessionSelection, select_session
from pixelprune.settings import ResizeSettings

KINDS = ("click", "type", "menu", "modal", "tab", "scroll", "navigate", "idle")
WAYS: dict[str, Callable[[Sequence[np.ndarray]], list[SessionSelection]]] = {
    "pred2d": lambda images: [select_session([image])[0] for image in images],
    "backward": partial(select_session, direction="backward"),
    "forward": partial(select_session, direction="forward"),
    "keep_replaced": partial(select_session, direction="forward", keep_replaced=True),
}
WINDOWS = range(1, 11)
SUPERVISED_TOKENS = 40


def strange(sessions: Sequence[Walked], number: int, image: np.ndarray) -> np.ndarray | None:
    """A screenshot of this size of another session, or None."""
    for step in range(1, len(sessions)):
        other = sessions[(number + step) % len(sessions)]
        for candidate in other.images:
            if candidate.shape == image.shape:
                return candidate
    return None


def by_kind(sessions: Sequence[Walked]) -> list[dict[str, Any]]:
    """Kept blocks of the steps of each kind, in sums."""
    sums: dict[str, defaultdict[str, int]] = {kind: defaultdict(int) for kind in (*KINDS, "all", "all but idle")}
    for number, session in enumerate(sessions):
        kept = {way: [one.num_kept for one in choose(session.images)] for way, choose in WAYS.items()}
        for step in range(1, len(session)):
            image = session.images[step]
            other = strange(sessions, number, image)
            if session.images[step - 1].shape != image.shape or other is None:
                continue
            counts = {way: numbers[step] for way, numbers in kept.items()}
            counts |= {"backward": kept["backward"][step - 1], "pred2d before": kept["pred2d"][step - 1]}
            counts["strange"] = select_session([other, image], direction="forward")[1].num_kept
            counts |= {"blocks": image.shape[0] * image.shape[1] // 1024, "steps": 1}
            kind = session.kinds[step - 1]
            for group in (kind, "all", *(["all but idle"] if kind != "idle" else [])):
                for name, count in counts.items():
                    sums[group][name] += count
    return [{"kind": kind, **counts} for kind, counts in sums.items() if counts]


def in_windows(sessions: Sequence[Walked], cost: CostModel) -> list[dict[str, Any]]:
    """Kept blocks, tokens and FLOPs of every window of every length; ratios to Full are of sums."""
    rows = []
    for length in WINDOWS:
        sums: defaultdict[str, float] = defaultdict(float)
        num_windows = 0
        for session in sessions:
            for first in range(len(session) - length + 1):
                images, text = (
                    session.images[first : first + length],
                    session.num_text_tokens(first, first + length - 1),
                )
                kept = {way: [one.num_kept for one in choose(images)] for way, choose in WAYS.items()}
                kept["Full"] = [image.shape[0] * image.shape[1] // 1024 for image in images]
                num_windows += 1
                for way, blocks in kept.items():
                    sums[f"{way} blocks"] += sum(blocks)
                    sums[f"{way} tokens"] += sum(blocks) + text
                    sums[f"{way} flops"] += cost.sample_flops(
                        kept_blocks=blocks, text_tokens=text, supervised_tokens=SUPERVISED_TOKENS, training=True
                    )
        if num_windows:
            rows.append({"screenshots": length, "windows": num_windows, **sums})
    return rows


def under_actions(sessions: Sequence[Walked], history: int = 4) -> list[dict[str, Any]]:
    """Of the actions that have a place: in how many is the block under it kept in the current screenshot."""
    hits: dict[str, list[tuple[bool, bool]]] = {way: [] for way in WAYS}
    for session in sessions:
        for step, block in enumerate(session.blocks):
            if block is None:
                continue
            for way, choose in WAYS.items():
                now = choose(session.images[max(0, step - history) : step + 1])[-1]
                hits[way].append((bool(now.keep[block]), step > 0))
    return [
        {
            "way": way,
            "actions": len(found),
            "kept": sum(kept for kept, _ in found),
            "later actions": sum(later for _, later in found),
            "later kept": sum(kept for kept, later in found if later),
        }
        for way, found in hits.items()
    ]


def doubled(image: np.ndarray) -> np.ndarray:
    """The image twice as wide and high, as a screen of twice the density would show it."""
    return np.ascontiguousarray(image.repeat(2, axis=0).repeat(2, axis=1))


def speed(sessions: Sequence[Walked], repeats: int) -> list[dict[str, Any]]:
    """CPU time of choosing over that of copying the same images, medians over rounds, then over every other session."""
    rows = []
    for name, change in (("as they are", lambda image: image), ("twice as wide and high", doubled)):
        ratios: defaultdict[str, list[float]] = defaultdict(list)
        megapixels = []
        for session in sessions[::2]:
            images = [change(image) for image in session.images]
            megapixels.append(images[0].shape[0] * images[0].shape[1] / 1e6)
            room = np.empty_like(images[0])
            ways: dict[str, Callable[[Sequence[np.ndarray]], object]] = {
                **WAYS,
                "select": lambda images: [select(image) for image in images],
                "copyto": lambda images, room=room: [np.copyto(room, image) for image in images],  # type: ignore[misc]
            }
            found: defaultdict[str, list[float]] = defaultdict(list)
            for number in range(repeats + 1):
                for way, choose in ways.items():
                    copying = sum(cpu_seconds(image.copy) for image in images)
                    choosing = cpu_seconds(partial(choose, images))
                    if number:
                        found[way].append(choosing / copying)
            for way, numbers in found.items():
                ratios[way].append(statistics.median(numbers))
        medians = {way: statistics.median(numbers) for way, numbers in ratios.items()}
        rows.append({"images": name, "megapixels": statistics.median(megapixels), **medians})
    return rows


def cpu_seconds(work: Callable[[], object]) -> float:
    start = time.thread_time()
    work()
    return time.thread_time() - start


def share(row: dict[str, Any], way: str, what: str) -> float:
    return float(row[f"{way} {what}"] / row[f"Full {what}"])


def tables(record: dict[str, Any]) -> str:
    """The record's four tables."""
    kinds = [
        {
            "step": row["kind"],
            "steps": row["steps"],
            **{way: f"{row[way] / row['blocks']:.1%}" for way in ("pred2d", "forward", "keep_replaced", "strange")},
            "backward (pred2d of the same)": f"{row['backward'] / row['blocks']:.1%} "
            f"({row['pred2d before'] / row['blocks']:.1%})",
            "forward / pred2d": f"{row['forward'] / row['pred2d']:.2f}",
            "backward / pred2d": f"{row['backward'] / row['pred2d before']:.2f}",
        }
        for row in record["by_kind"]
    ]
    windows = [
        {
            "screenshots": row["screenshots"],
            "windows": row["windows"],
            **{
                way: f"{share(row, way, 'blocks'):.1%}, {share(row, way, 'tokens'):.3f}, {share(row, way, 'flops'):.3f}"
                for way in WAYS
            },
        }
        for row in record["in_windows"]
    ]
    actions = [
        {
            "way": row["way"],
            "actions": row["actions"],
            "block kept": f"{row['kept']} ({row['kept'] / row['actions']:.0%})",
            "after the first screenshot": f"{row['later kept']} of {row['later actions']}",
        }
        for row in record["under_actions"]
    ]
    speeds = [
        {
            "screenshots": row["images"],
            "megapixels": f"{row['megapixels']:.2f}",
            **{way: f"{row[way]:.2f}x" for way in ("select", *WAYS)},
            "np.copyto": f"{row['copyto']:.2f}x",
        }
        for row in record["speed"]
    ]
    return "\n\n".join(
        (
            "Kept blocks by what the step did:\n\n" + markdown_table(kinds),
            "In windows, each as kept blocks, tokens and FLOPs against Full:\n\n" + markdown_table(windows),
            "The block under an action, in windows of five:\n\n" + markdown_table(actions),
            "CPU time over that of `image.copy()`, per image; `np.copyto` copies into memory that is at hand, which "
            "`copy` has to be given first:\n\n" + markdown_table(speeds),
        )
    )


def draw(record: dict[str, Any], picture: Path) -> None:
    """Bars by kind of step; FLOPs over the length of the window."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    colours = {"pred2d": "#8a93a3", "forward": "#2f6fdb", "keep_replaced": "#7b4fc9", "backward": "#128a5f"}
    names = {"keep_replaced": "forward, keep_replaced"}
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.2), width_ratios=(3, 2))
    rows = [row for row in record["by_kind"] if row["kind"] != "all but idle"]
    for number, (way, colour) in enumerate(colours.items()):
        shares = [100 * row[way] / row["blocks"] for row in rows]
        places = [place + 0.2 * (number - 1.5) for place in range(len(rows))]
        left.bar(places, shares, 0.19, color=colour, label=names.get(way, way))
    left.set_xticks(range(len(rows)), [f"{row['kind']}\n{row['steps']}" for row in rows])
    left.set_ylabel("kept blocks, %")
    left.set_title("by what the step did (and how many steps)", fontsize=10)
    left.legend(frameon=False, fontsize=9)
    lengths = [row["screenshots"] for row in record["in_windows"]]
    for way, colour in colours.items():
        shares = [share(row, way, "flops") for row in record["in_windows"]]
        right.plot(lengths, shares, marker="o", markersize=4, color=colour, label=names.get(way, way))
    right.set_ylim(0)
    right.set_xticks(lengths)
    right.set_xlabel("screenshots in the window")
    right.set_title("training FLOPs against Full, Qwen3-VL-2B", fontsize=10)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(picture, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=SAMPLES, help="written by `data_tools sessions`")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--picture", type=Path, help="draw the shares into this file")
    parser.add_argument("--no-record", action="store_true")
    options = parser.parse_args()
    sessions = read_walked(options.folder, ResizeSettings())
    cost = CostModel.from_config(shape_config("2b"))
    record: dict[str, Any] = {
        "num_sessions": len(sessions),
        "num_screenshots": sum(map(len, sessions)),
        "by_kind": by_kind(sessions),
        "in_windows": in_windows(sessions, cost),
        "under_actions": under_actions(sessions),
        "speed": speed(sessions, options.repeats),
        "load_average": os.getloadavg(),
    }
    loads = ", ".join(f"{load:.1f}" for load in record["load_average"])
    table = (
        f"{record['num_sessions']} sessions, {record['num_screenshots']} screenshots of {options.folder.name}. Load "
        f"averages at the end: {loads}.\n\n{tables(record)}"
    )
    print(table)
    if options.picture:
        draw(record, options.picture)
    if not options.no_record:
        write_record("sessions", record, table)


if __name__ == "__main__":
    main()
