"""The convergence demonstration's parts: screens that show what their records say, and an honest constant answer."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from benchmarks import convergence, convergence_lr, share_convergence
from benchmarks.convergence import MODES, Settings, best_constant, exit_code, orders
from benchmarks.parts.screens import CELL, COLOURS, draw_screen, write_screens
from pixelprune.answers import parse_answer


@pytest.mark.parametrize("seed", range(5))
def test_a_control_has_its_name_s_colour_in_its_box_and_nowhere_else(seed):
    image, controls = draw_screen(seed, side=192, num_controls=4)
    pixels = np.asarray(image)
    for name, element, (x1, y1, x2, y2) in controls:
        has_colour = (pixels == COLOURS[name.split()[0]]).all(axis=-1)
        rows, cols = np.nonzero(has_colour)
        assert has_colour.sum() > CELL * CELL / 4
        assert (x1, y1) <= (cols.min(), rows.min())
        assert cols.max() <= x2
        assert rows.max() <= y2
        assert (element == "text") == name.endswith("button")
    for (_, _, one), (_, _, two) in itertools.combinations(controls, 2):
        assert one[2] < two[0] or two[2] < one[0] or one[3] < two[1] or two[3] < one[1], "boxes are apart"


def test_screens_are_a_function_of_their_seed():
    first, again, other = (draw_screen(seed, side=192, num_controls=4) for seed in (7, 7, 8))
    assert first[1] == again[1]
    assert first[0].tobytes() == again[0].tobytes()
    assert first[0].tobytes() != other[0].tobytes()


def test_written_answers_hit_their_own_boxes(tmp_path):
    path = write_screens(tmp_path, "train", range(3), side=192, num_controls=4)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["id"][:11] for record in records] == ["train-00000", *2 * ["train-00001"], *3 * ["train-00002"]]
    for record in records:
        x1, y1, x2, y2 = record["metadata"]["bbox"]
        answer = parse_answer(record["messages"][1]["content"][0]["text"], image_size=(192, 192), strict=True)
        assert x1 < answer.point[0] < x2
        assert y1 < answer.point[1] < y2
        assert (tmp_path / record["messages"][0]["content"][0]["image"]).exists()


def test_the_best_constant_is_the_cell_that_most_boxes_hold(tmp_path):
    """A 100 x 200 image has cells of 10 x 20 pixels: two of four boxes hold the centre (35, 110) of one of them."""
    boxes = [[30, 100, 40, 120], [34, 109, 36, 111], [0, 0, 4, 4], [60, 150, 69, 169]]
    rows = [{"metadata": {"bbox": box, "image_size": [100, 200]}} for box in boxes]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert best_constant(tmp_path / "a.jsonl") == 0.5


def test_steps_use_every_record_once_per_pass():
    settings = Settings(num_steps=5, samples_per_step=4)
    steps = list(orders(10, settings))
    assert steps == list(orders(10, settings))
    assert [len(step) for step in steps] == [4] * 5
    drawn = [i for step in steps for i in step]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))


def test_a_missed_check_fails_unless_the_run_was_cut_short(capsys):
    good, bad = {"train": True, "held-out": True}, {"train": True, "held-out": False}
    assert exit_code({"Full": good, "PixelPrune": good}, Settings()) == 0
    assert exit_code({"Full": good, "PixelPrune": bad}, Settings()) == 1
    assert "missed: PixelPrune: held-out" in capsys.readouterr().err
    assert exit_code({"Full": good, "PixelPrune": bad}, Settings(num_steps=Settings.num_steps - 1)) == 0


def test_a_run_of_two_steps_reports_what_it_reached(tmp_path):
    """All of it, through both training processes; two steps teach nothing."""
    sizes = ["--pages", "2", "--held-out-pages", "1", "--steps", "2", "--every", "2"]
    assert convergence.main([*sizes, "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "convergence.json").read_text())
    assert [row["step"] for row in record["evaluations"]] == [0, 2]
    assert set(record["checks"]) == set(record["train_accuracy"]) == set(MODES)
    assert not all(holds for checks in record["checks"].values() for holds in checks.values())
    assert all(set(MODES) < set(row) for row in record["evaluations"])
    assert 0 < record["retain_ratio"] < 1 < record["flops_ratio"]
    assert (tmp_path / "convergence.png").exists()


def test_rates_are_chosen_on_validation_by_the_first_seed(tmp_path, capsys):
    """All of it in two steps, then once more from the cells alone."""
    sizes = ["--pages", "2", "--held-out-pages", "1", "--steps", "2", "--every", "2", "--seeds", "1", "--lrs", "1e-3"]
    where = ["--folder", str(tmp_path / "cells"), "--out", str(tmp_path)]
    assert convergence_lr.main([*sizes, *where]) == 0
    cells = {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").glob("*.json")}
    convergence_lr.main([*sizes, *where])
    assert len(cells) == 3
    assert all(path.stat().st_mtime_ns == when for path, when in cells.items() if path.stem != "settings")
    runs = json.loads((tmp_path / "convergence_lr.json").read_text())["runs"]
    assert list(runs) == ["Full, 0.001, seed 0", "PixelPrune, 0.001, seed 0"]
    assert (tmp_path / "convergence_lr.png").exists()

    def cell(validation: float, held_out: float) -> dict:
        row = {"Full -> Full": held_out, "PixelPrune -> PixelPrune": held_out}
        return {"validation_accuracy": dict.fromkeys(row, validation), "evaluations": [row], "cpu_seconds": 1.0}

    by_lr = {1e-3: {0: cell(0.6, 0.5), 1: cell(0, 0.7)}, 3e-3: {0: cell(0.4, 0.9)}}
    text = convergence_lr.tables({"Full": by_lr, "PixelPrune": by_lr})
    assert "| Full -> Full | 0.001 | 60.0% ± 14.1% | 50.0%, 70.0% | 1 |" in text


def test_orders_over_screenshots_beside_the_plain_one_in_four_steps(tmp_path):
    sizes = ["--pages", "8", "--held-out-pages", "1", "--steps", "4"]
    share_convergence.main([*sizes, "--out", str(tmp_path)])
    record = json.loads((tmp_path / "share_convergence.json").read_text())
    runs = record["runs"]
    assert list(runs) == list(share_convergence.WAYS)
    assert [len(run["losses"]) for run in runs.values()] == [4, 4, 4, 1]
    assert {run["held_out"][-1][0] for run in runs.values()} == {4 * 32}, "records seen"
    assert record["off_to_step"] < 1e-5, "the same records in the same steps"
    assert runs["step"]["screens_per_step"] == runs["off"]["screens_per_step"] >= runs["group"]["screens_per_step"]
    assert runs["group"]["tokens"] <= runs["step"]["tokens"] < runs["off"]["tokens"]
    assert (tmp_path / "share_convergence.png").exists()
