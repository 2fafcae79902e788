"""The sheet shows the box and the point where the record says they are."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_tools.cli import main
from data_tools.records import grounding_record
from data_tools.sheet.draw import make_sheet

RED, BLUE = (230, 20, 60), (20, 90, 255)


def _record(number: int, box: list[int], answer: str) -> dict:
    return grounding_record(f"r{number}", "a.png", "Click it.", answer, {"bbox": box, "image_size": [600, 300]})


def test_box_and_point_are_drawn_where_the_record_says(tmp_path: Path) -> None:
    Image.new("RGB", (600, 300), (255, 255, 255)).save(tmp_path / "a.png")
    assert make_sheet([_record(0, [100, 50, 200, 90], "(250, 233)")], tmp_path, tmp_path / "s.png") == 1
    with Image.open(tmp_path / "s.png") as sheet:
        pixels = np.asarray(sheet.convert("RGB"))[8:, 8:]  # the sheet's margin
    scale = min(620 / 600, (420 - 74) / 300)
    rows, cols = np.nonzero((pixels == RED).all(axis=2))
    drawn = np.array([cols.min(), rows.min(), cols.max(), rows.max()])
    assert np.abs(drawn - np.array([100, 50, 200, 90]) * scale).max() <= 3
    rows, cols = np.nonzero((pixels == BLUE).all(axis=2))
    assert abs(cols.mean() - 150 * scale) <= 1.5
    assert abs(rows.mean() - 69.9 * scale) <= 1.5


def test_every_record_is_as_likely_to_be_drawn() -> None:
    from data_tools.sheet import draw as sheet

    records = [_record(number, [1, 2, 3, 4], "(1, 2)") for number in range(20)]
    counts = np.zeros(20)
    for seed in range(2000):
        chosen = sheet._draw_lots(records, 5, sheet.random.Random(seed))
        assert len({record["id"] for record in chosen}) == 5
        for record in chosen:
            counts[int(record["id"][1:])] += 1
    assert np.abs(counts - 500).max() < 100  # over 5 standard deviations of 19.4


def test_the_command_draws_and_names_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (600, 3000), (255, 255, 255)).save(tmp_path / "a.png")
    file = tmp_path / "r.jsonl"
    file.write_text("\n".join(json.dumps(_record(i, [100, 2800, 200, 2900], "nonsense [1")) for i in range(6)))
    out = tmp_path / "sheet.png"
    assert main(["sheet", str(file), "--out", str(out), "--count", "5", "--columns", "2"]) == 0
    with Image.open(out) as sheet:
        assert sheet.size == (2 * 628 + 8, 3 * 428 + 8)
    file.write_text('{"messages": []}\n{oops\n')
    assert main(["sheet", str(file), "--out", str(out)]) == 2
    assert "line 2: not JSON" in capsys.readouterr().err
    file.write_text('{"messages": []}\n')
    assert main(["sheet", str(file), "--out", str(out)]) == 2
    assert "no record with an image" in capsys.readouterr().err
