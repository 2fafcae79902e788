"""What benchmarks.sessions counts, on sessions whose counts are known."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks.parts.shapes import shape_config
from benchmarks.parts.walked import SAMPLES, Walked, read_walked
from benchmarks.sessions import by_kind, in_windows, under_actions
from pixelprune.flops import CostModel
from pixelprune.settings import ResizeSettings


def walked(name: str, seed: int) -> Walked:
    """Two screenshots of 2 x 3 blocks that have nothing in common; the second differs in the last block."""
    first = np.random.default_rng(seed).integers(0, 255, (64, 96, 3), dtype=np.uint8)
    second = first.copy()
    second[32:, 64:] = 255 - second[32:, 64:]
    return Walked(name, [first, second], ["click", "end"], [(0, 1), (1, 1)], ["Click.", "Finish."])


def test_blocks_are_counted_where_they_are_kept() -> None:
    sessions = [walked("a", 1), walked("b", 2)]
    rows = {row["kind"]: row for row in by_kind(sessions)}
    assert set(rows) == {"click", "all", "all but idle"}
    click = rows["click"]
    assert (click["steps"], click["blocks"], click["pred2d"], click["pred2d before"]) == (2, 12, 12, 12)
    assert (click["forward"], click["keep_replaced"], click["backward"]) == (
        4,
        4,
        4,
    )  # the first block, the changed one
    assert click["strange"] == 12
    found = {row["way"]: row for row in under_actions(sessions)}
    assert {way: (row["kept"], row["later kept"]) for way, row in found.items()} == {
        "pred2d": (4, 2), "backward": (4, 2), "forward": (2, 0), "keep_replaced": (2, 0),
    }  # fmt: skip
    one, two = in_windows(sessions, CostModel.from_config(shape_config("toy")))
    assert (one["windows"], one["Full blocks"], one["forward blocks"]) == (4, 24, 24)
    assert (two["windows"], two["Full blocks"], two["pred2d blocks"], two["forward blocks"]) == (2, 24, 24, 16)
    assert two["Full tokens"] - two["forward tokens"] == 8
    assert two["forward flops"] < two["pred2d flops"] == pytest.approx(two["Full flops"])


def test_committed_sessions_are_read_with_the_block_under_each_action() -> None:
    session = read_walked(SAMPLES, ResizeSettings())[0]
    step = json.loads((SAMPLES / "sessions.jsonl").open(encoding="utf-8").readline())["steps"][0]
    assert session.images[0].shape == (640, 960, 3)
    assert session.blocks[0] == (int(step["place"][1] // 32), int(step["place"][0] // 32))
    assert session.blocks[-1] is None
