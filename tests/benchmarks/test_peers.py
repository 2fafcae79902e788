"""The benchmark against other trainers: same records for all, what is counted, and one of them beside ours."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.parts.peers.drills import last_error
from benchmarks.parts.peers.environments import ENVIRONMENTS, REQUIREMENTS, python_of
from benchmarks.parts.peers.runs import TRAINERS, prepare
from benchmarks.parts.peers.workloads import WORKLOADS, Record, Workload, choose_records, write_model
from benchmarks.peers import BASE, LOSS_TOLERANCE, drill_table, num_lines, step_table, summarise

MADE = Path(__file__).parents[2] / "runs" / "peers" / "environments"
SMALL = Workload("small", 65536, 2, 2)


def test_every_form_of_a_record_says_the_same(tmp_path):
    records = choose_records(50, tmp_path)
    assert len({record.image for record in records[:40]}) == 40, "each screenshot in turn"
    for record in records:
        assert record.image.is_absolute()
        assert record.image.exists()
        user, assistant = record.ours()["messages"]
        plain, marked = record.plain(), record.placeholders()
        assert user["content"][1]["text"] == plain["question"] == record.question
        assert assistant["content"][0]["text"] == plain["answer"] == record.answer
        assert tmp_path / user["content"][0]["image"] == Path(plain["images"][0]) == Path(marked["images"][0])
        texts = [turn["content"] for turn in marked["messages"]]
        assert texts == [f"<image>{record.question}", record.answer]
    with pytest.raises(ValueError, match="expected at most 360 records, got 361"):
        choose_records(361, tmp_path)


def test_every_trainer_has_a_driver_and_pins(tmp_path):
    assert {trainer.environment for trainer in TRAINERS} == {*ENVIRONMENTS, "ours"}
    for name in ENVIRONMENTS:
        lines = (REQUIREMENTS / f"{name}.txt").read_text().split()
        assert all(line.count("==") == 1 for line in lines), "whole lists: installed without dependencies"
        assert not any(line.startswith("torch==") for line in lines), "torch is this environment's"
        assert python_of(name, tmp_path) is None
        (tmp_path / name).mkdir()
        (tmp_path / name / "requirements.txt").write_text("torch==1.0\n")
        assert python_of(name, tmp_path) is None, "made from another list"
    for trainer in TRAINERS:
        assert num_lines(trainer, None if trainer.form == "plain" else {"a": 1, "b": 2}) >= 2


def test_a_trainer_is_set_beside_the_base_of_the_same_round():
    def cell(seconds: float, loss: float) -> dict:
        steps = [{"loss": loss, "cpu_s": s, "wall_s": 2 * s, "peak_bytes": 5} for s in (9, seconds, seconds)]
        return {"start": {"start_cpu_s": 1.0, "held_bytes": 2}, "steps": steps, "lines": 3}

    ours = next(trainer for trainer in TRAINERS if trainer.name == "ours, Full")
    base = next(trainer for trainer in TRAINERS if trainer.name == BASE)
    cells = {f"small|{base.key}|round 0": cell(2, 1.0), f"small|{base.key}|round 1": cell(6, 1.0)}
    cells |= {f"small|{ours.key}|round 0": cell(1, 1.1), f"small|{ours.key}|round 1": cell(2, 1.1)}
    rows = {row["trainer"]: row for row in summarise(cells, SMALL, [base, ours], 2)}
    assert rows[ours.name]["speed_up_by_round"] == [2.0, 3.0]
    assert rows[ours.name]["speed_up"] == 2.5
    assert rows[ours.name]["first_start_cpu_s"] == 10.0
    assert rows[ours.name]["step_bytes"] == 3
    assert rows[ours.name]["loss_difference"] == pytest.approx(0.1)
    assert "over the tolerance" in step_table(list(rows.values()))


def test_what_a_drill_found_is_said():
    went_on = {"was_alive": True, "exit_code": 0, "goes_on_with_step": 5, "largest_difference": 0.0, "said": ""}
    ended = {"was_alive": True, "exit_code": 1, "goes_on_with_step": None, "said": "ValueError: a | b"}
    broken = {"exit_code": 1, "steps_done": 1, "names_the_picture": False, "other_steps": [], "said": "OSError: cut"}
    key = f"{WORKLOADS[0].key}|{TRAINERS[0].key}"
    cells = {f"{key}|killed": went_on, f"{key}|killed in a save": ended, f"{key}|broken picture": broken}
    table = drill_table(cells, WORKLOADS[0], [TRAINERS[0]])
    assert "goes on with step 5, equal bits" in table
    assert "the restart ends: `ValueError: a / b`" in table
    assert "ends after 1 steps, the picture not named: `OSError: cut`" in table
    output = "Traceback\n  File x\nOSError: image file is truncated\n\nfinal words\n"
    assert last_error(output) == "OSError: image file is truncated"
    assert last_error("only\nwords\n") == "words"


@pytest.mark.skipif(python_of("trl", MADE) is None, reason="python -m benchmarks.peers --make was not run here")
def test_hf_trainer_trains_as_ours_does(tmp_path):
    records = []
    for number in range(SMALL.batch * SMALL.steps):
        image = tmp_path / "images" / f"{number}.png"
        image.parent.mkdir(exist_ok=True)
        Image.linear_gradient("L").rotate(90 * number).convert("RGB").save(image)  # 256 x 256: nothing is resized
        records.append(Record(image, "Where is Save?", f"({number}, {number * 7})"))
    write_model(tmp_path / "model", SMALL.max_pixels)
    losses = {}
    for trainer in TRAINERS:
        if trainer.name in (BASE, "ours, Full"):
            start = prepare(trainer, SMALL, records, tmp_path / "model", tmp_path / trainer.key)
            python = python_of(trainer.environment, MADE)
            assert python is not None
            assert start.finish(python.absolute()) == 0, start.output()[-3000:]
            losses[trainer.name] = [row["loss"] for row in start.rows()]
            assert all(row["cpu_s"] > 0 and row["peak_bytes"] > 0 for row in start.rows())
            assert json.loads((start.folder / "job.json").read_text())["steps"] == len(start.rows())
    assert losses["ours, Full"] == pytest.approx(losses[BASE], rel=1e-5)  # no picture is resized: float32 sums
    assert LOSS_TOLERANCE > 1e-5
