"""Table 9: what is measured of a file's images is what is counted by hand, on any number of ranks, after any stop."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training import tables
from training.evaluation import redundancy

ROOT = Path(__file__).parents[2]


def blocks(*rows: str) -> Image.Image:
    """An image of 32 x 32 blocks, one of its own colour per letter."""
    grid = np.array([[[ord(letter), 0, 7] for letter in row] for row in rows], dtype=np.uint8)
    return Image.fromarray(grid.repeat(32, axis=0).repeat(32, axis=1))


@pytest.fixture
def data(tmp_path) -> Path:
    blocks("aab", "aac").save(tmp_path / "one.png")  # 4 of 6 equal another; pred2d keeps a, b, c
    blocks("xyz", "xyz").save(tmp_path / "two.png")  # all 6 do; pred2d keeps x, y, z
    (tmp_path / "broken.png").write_bytes(b"no image")
    with (tmp_path / "pages.jsonl").open("w") as file:
        for name in ("one.png", "two.png", "one.png", "broken.png"):
            content = [{"type": "image", "image": name}, {"type": "text", "text": "What?"}]
            file.write(json.dumps({"messages": [{"role": "user", "content": content}]}) + "\n")
        file.write(json.dumps({"messages": "none"}) + "\n")
    return tmp_path / "pages.jsonl"


def arguments(data: Path, out: Path, *more: str) -> list[str]:
    return ["redundancy", "--data", str(data), "--out", str(out), "--min-pixels", "1024", *more]


def check(out: Path) -> None:
    row = json.loads((out / "redundancy.json").read_text())["rows"]["pages"]
    assert (row["num_images"], row["num_blocks"]) == (2, 12), "an image that two records share counts once"
    assert row["duplicate_ratio"] == pytest.approx(10 / 12)
    assert row["retain_ratio"]["pred2d"] == pytest.approx(6 / 12)
    # Raster: a b a c, as one row follows the other; x y z x y z.
    assert row["retain_ratio"]["raster"] == pytest.approx(10 / 12)
    assert row["mean_size"] == [64, 96]
    assert len(row["unreadable"]) == row["num_refused"] == 1
    text = (out / "redundancy.md").read_text()
    assert "| pages | 2 | 96 x 64 | 83.3 | 50.0 | 83.3 |" in text
    assert "1 images and 1 records could not be read" in text


def test_values_are_those_computed_by_hand(data, tmp_path, capsys):
    assert tables.main(arguments(data, tmp_path / "out")) == 0
    check(tmp_path / "out")
    assert "Table 9" in capsys.readouterr().out


def test_a_stopped_measurement_goes_on_and_measures_nothing_twice(data, tmp_path, monkeypatch):
    measured = []
    real = redundancy._measured

    def counting(ref, *more):
        measured.append(ref.source)
        return real(ref, *more)

    monkeypatch.setattr(redundancy, "_measured", counting)
    assert tables.main(arguments(data, tmp_path / "out", "--limit", "1")) == 0
    (part,) = (tmp_path / "out" / "cells").glob("*/rank0000.jsonl")
    part.write_text(part.read_text() + '["cut of')  # as a kill leaves it
    assert tables.main(arguments(data, tmp_path / "out")) == 0
    check(tmp_path / "out")
    assert measured == ["one.png", "two.png", "broken.png"]
    assert tables.main(arguments(data, tmp_path / "out")) == 0
    assert len(measured) == 3


@pytest.mark.ranks
def test_two_ranks_share_the_images(data, tmp_path):
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command = [*start, "training.tables", *arguments(data, tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    check(tmp_path / "out")
    parts = sorted((tmp_path / "out" / "cells").glob("*/rank*.jsonl"))
    assert [len(part.read_text().splitlines()) for part in parts] == [2, 1]


def test_what_belongs_to_other_tables_is_refused(data, tmp_path, capsys):
    assert tables.main(arguments(data, tmp_path / "out", "--model", "somewhere")) == 2
    assert "--model: the table 'redundancy' asks no model" in " ".join(capsys.readouterr().err.split())
    (tmp_path / "text.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "Hi"}]}) + "\n")
    assert tables.main(arguments(tmp_path / "text.jsonl", tmp_path / "out")) == 2
    assert "no record with an image" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(SystemExit) as caught:
        tables.main(arguments(data, tmp_path / "out", "--batch-size", "3"))
    assert caught.value.code == 2
