"""benchmarks.sessions_learn in its short form: pictures show what is asked, cells are kept, tables add up."""

from __future__ import annotations

import json

import numpy as np

from benchmarks import sessions_learn
from benchmarks.parts.drawn_sessions import ACTIONS, COLUMNS, PLACES, TASKS, draw_session
from benchmarks.parts.screens import COLOURS
from benchmarks.sessions_learn import SCRATCH, TAUGHT, WAYS, tables
from pixelprune.settings import BLOCK


def cells_of(image, colour: str) -> list[tuple[int, int]]:
    """Row and column of the blocks that show a colour."""
    pixels = np.asarray(image).reshape(-1, BLOCK, COLUMNS, BLOCK, 3).swapaxes(1, 2)
    found = (pixels == COLOURS[colour]).all(axis=-1).any(axis=(2, 3))
    return [(int(row), int(column)) for row, column in np.argwhere(found)]


def test_pictures_show_what_the_answers_say() -> None:
    last_actions = set()
    for seed in range(20):
        images, answers = draw_session(seed)
        assert cells_of(images[-1], "red") == [(0, PLACES.index(answers["now"]))] != cells_of(images[0], "red")
        assert {tuple(cells_of(image, "blue")) for image in images} == {((1, PLACES.index(answers["still"])),)}
        assert len(cells_of(images[0], answers["gone"])) == 1
        assert cells_of(images[-1], answers["gone"]) == []
        told = {"moved": "red", "closed": answers["gone"], "opened": "pink"}
        differs = [action for action, c in told.items() if cells_of(images[-2], c) != cells_of(images[-1], c)]
        assert differs == [answers["changed"]]
        last_actions.add(answers["changed"])
    assert last_actions == set(ACTIONS)


def test_every_cell_is_trained_once_and_read_afterwards(tmp_path, monkeypatch) -> None:
    sizes = ["--sessions", "16", "--held-out", "4", "--steps", "1", "--taught-steps", "1", "--seeds", "1"]
    arguments = [*sizes, "--folder", str(tmp_path / "cells"), "--out", str(tmp_path)]
    sessions_learn.main(arguments)
    record = (tmp_path / "sessions_learn.json").read_bytes()
    found = json.loads(record)
    assert {kind: set(ways) for kind, ways in found["cells"].items()} == {
        SCRATCH: set(WAYS), TAUGHT: set(WAYS) - {"Full"},
    }  # fmt: skip
    assert found["flops"]["Full"] == found["kept"]["Full"] == 1
    for kind, ways in found["cells"].items():
        for way, cells in ways.items():
            assert cells[0]["steps"] == [1, round(1 / found["flops"][way])], (kind, way)
    monkeypatch.setattr(sessions_learn.Bench, "_train", None)
    sessions_learn.main(arguments)
    assert json.loads((tmp_path / "sessions_learn.json").read_text())["cells"] == found["cells"]


def test_the_tables_show_means_and_spreads_of_seeds() -> None:
    def cell(value: float) -> dict:
        return {"steps": [10, 20], "at_steps": dict.fromkeys(TASKS, value), "at_flops": dict.fromkeys(TASKS, 1.0)}

    text = tables({SCRATCH: {"backward": [cell(0.5), cell(0.7)]}}, {"backward": 0.25}, {"backward": 0.5})
    told = "| ".join(["60.0 ± 14.1 "] * 5)
    assert f"| backward | 25% | 0.50 | steps | 10 | {told}|" in text
    assert "| backward | 25% | 0.50 | FLOPs | 20 | 100.0 ± 0.0 |" in text
