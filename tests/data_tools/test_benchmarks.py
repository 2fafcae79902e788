"""Benchmarks in their published shapes: what evaluation reads of the records is what the files say."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from data_tools.cli import main
from pixelprune.records.reader import parse_record
from training.evaluation.scoring import judge, summarise
from training.evaluation.targets import target_of


def test_chartqa(tmp_path: Path, capsys):
    (tmp_path / "png").mkdir()
    Image.new("RGB", (64, 32), "white").save(tmp_path / "png" / "41699.png")
    human = [
        {"imgname": "41699.png", "query": "How many bars?", "label": "14"},
        {"imgname": "gone.png", "query": "How many bars?", "label": "14"},
        {"imgname": "41699.png", "query": "Which?", "label": 3},
    ]
    augmented = [{"imgname": "41699.png", "query": "Is it <image>?", "label": "No"}]
    (tmp_path / "test_human.json").write_text(json.dumps(human))
    (tmp_path / "test_augmented.json").write_text(json.dumps(augmented))
    out = tmp_path / "chartqa.jsonl"
    command = ["chartqa", str(tmp_path), "--images", str(tmp_path / "png"), "--out", str(out), "--sheet", "0"]
    assert main(command) == 0
    rows = {row["id"]: row for row in map(json.loads, out.read_text().splitlines())}
    assert list(rows) == ["test_augmented-00000", "test_human-00000"]
    report = json.loads(out.with_suffix(".report.json").read_text())
    assert report["dropped"]["entries"] == {"image missing": 1, "label is no text": 1}
    assert report["subsets"] == {"human": 1, "augmented": 1}
    records = {name: parse_record(row) for name, row in rows.items()}
    assert records["test_augmented-00000"].messages[0].text == "Is it <image>?", "typed texts mean what they say"
    answers = {"test_human-00000": "14.5", "test_augmented-00000": "Yes"}
    found = [judge(name, target_of(record), answers[name], (64, 32), "auto") for name, record in records.items()]
    result = summarise(found)
    assert {name: score["accuracy"] for name, score in result["subset"].items()} == {"human": 1, "augmented": 0}
    assert result["benchmark"]["chartqa"]["macro"] == 0.5
    (tmp_path / "test.json").write_text(json.dumps(human))
    other = [
        "chartqa",
        str(tmp_path / "test.json"),
        "--images",
        str(tmp_path / "png"),
        "--out",
        str(out),
        "--overwrite",
    ]
    assert main(other) == 2
    assert "named for one of human, augmented" in " ".join(capsys.readouterr().err.split())
