"""Tables: every command runs end to end, values equal those computed by hand, no cell is computed twice."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from pixelprune.command import INTERRUPTED
from pixelprune.hf import Generation
from tests.conftest import screen
from training import tables
from training.evaluation import answering, passes
from training.evaluation.table_files import Cell, markdown, mean_score
from training.evaluation.table_plans import FULL, TABLES, TablePlan, depth_rows

ANSWERS = {0: "sitting", 1: "kitten", 2: "105", 3: "12"}
"""What the patched model answers to question number n, whatever the pruning."""


def write_data(folder: Path) -> list[str]:
    """Two benchmarks: docs by ANLS in two subsets of sizes 1 and 2, charts by relaxed accuracy."""
    Image.fromarray(screen(3, 4, seed=1)).save(folder / "a.png")
    files = {
        "docs": [(0, "anls", "x", "sitting"), (1, "anls", "y", "sitting"), (0, "anls", "y", "nothing like it")],
        "charts": [(2, "relaxed", "", "100"), (3, "relaxed", "", "100")],
    }
    for name, rows in files.items():
        with (folder / f"{name}.jsonl").open("w") as file:
            for number, scorer, subset, answer in rows:
                content = [{"type": "image", "image": "a.png"}, {"type": "text", "text": f"Question {number}?"}]
                metadata = {"scorer": scorer, "answers": [answer], "source": name, "subset": subset}
                row = {"messages": [{"role": "user", "content": content}], "metadata": metadata}
                file.write(json.dumps(row) + "\n")
    return [str(folder / "docs.jsonl"), f"short_answer:{folder / 'charts.jsonl'}"]


@pytest.fixture
def asked(monkeypatch) -> list[str]:
    """Prompts that a model was asked; it answers as `ANSWERS` says."""
    prompts: list[str] = []

    def generate(model, inputs, **arguments):
        prompts.extend(inputs.texts)
        texts = [ANSWERS[int(re.search(r"Question (\d)", text).group(1))] for text in inputs.texts]
        return Generation(texts, [[1]] * len(texts), None)

    monkeypatch.setattr(answering, "generate", generate)
    return prompts


def make(name: str, model: Path, data: list[str], out: Path, *more: str) -> int:
    models = [str(model)] if len(TABLES[name].roles) == 1 else [f"{role}={model}" for role in TABLES[name].roles]
    more = (*more, "--depths", "-1", "0", "1") if name == "depth" else more
    return tables.main([name, "--model", *models, "--data", *data, "--out", str(out), "--min-pixels", "1024", *more])


def page_data(path: Path) -> dict:
    (content,) = re.findall(r'id="data">(.*)</script>\n<script>', path.read_text())
    return json.loads(content)


@pytest.mark.parametrize("name", TABLES)
def test_every_table_runs_and_holds_the_values_computed_by_hand(name, toy_folder, asked, tmp_path, capsys):
    data = write_data(tmp_path)
    assert make(name, toy_folder, data, tmp_path / "out") == 0
    content = json.loads((tmp_path / "out" / f"{name}.json").read_text())
    rows = TABLES[name].rows + (depth_rows([-1, 0, 1]) if name == "depth" else ())
    assert list(content["rows"]) == [row.label for row in rows]
    docs_macro = (1 + (4 / 7 + 0) / 2) / 2  # subset x: 1; subset y: kitten against sitting, and a miss
    for row, (label, found) in zip(rows, content["rows"].items(), strict=True):
        docs, charts = found["cells"]["docs"], found["cells"]["charts"]
        assert docs["score"] == pytest.approx(docs_macro)
        assert docs["micro"] == pytest.approx((1 + 4 / 7) / 3)
        assert charts["score"] == 1 / 2
        assert found["avg"] == pytest.approx((docs_macro + 1 / 2) / 2)
        assert (docs["retain_ratio"] == 1) == (row.strategy == "none"), label
    text = (tmp_path / "out" / f"{name}.md").read_text()
    assert f"Table {TABLES[name].number}:" in text
    assert f"{100 * docs_macro:.1f}" in text
    assert text in capsys.readouterr().out
    full = (
        {key: cell["prefill_flops"] for key, cell in content["rows"]["Full"]["cells"].items()} if FULL in rows else {}
    )
    for label, found in content["rows"].items():
        if full:
            own = sum(cell["prefill_flops"] for cell in found["cells"].values())
            assert found["prefill_flops_ratio"] == pytest.approx(own / sum(full.values()))
            assert (found["prefill_flops_ratio"] < 1) == (label != "Full")
    if name == "depth":
        ratios = [found["prefill_flops_ratio"] for found in content["rows"].values()]
        assert ratios[1] < ratios[2] < ratios[3] < ratios[0] == 1, "the deeper the dearer"
        assert "| Avg | FLOPs |" in text
        assert text.count("100.0 (100.0)") == 1, "Full against itself"
    assert (tmp_path / "out" / f"{name}.png").stat().st_size > 1000
    page = page_data(tmp_path / "out" / f"{name}.html")
    assert page["rows"] == [row.label for row in rows]
    assert {record["question"] for record in page["records"]} >= {"Question 0?", "Question 1?"}
    assert [cell["score"] for cell in page["cells"] if cell["benchmark"] == "docs"] == [
        pytest.approx(docs_macro)
    ] * len(rows)
    assert [set(record["given"]) for record in page["records"]] == [set(page["rows"])] * 5
    assert {"Answer the question using a single word" in prompt for prompt in asked if "Question 2" in prompt} == {True}
    assert {"Answer the question using a single word" in prompt for prompt in asked if "Question 0" in prompt} == {
        False
    }


def test_a_stopped_table_goes_on_and_shares_cells_with_the_next(toy_folder, asked, tmp_path, monkeypatch):
    data, out = write_data(tmp_path), tmp_path / "out"
    stop_at = 7
    predict = passes.predict

    def stopping(*arguments):
        for predictions in predict(*arguments):
            yield predictions
            if len(asked) >= stop_at:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(passes, "predict", stopping)
        assert make("strategies", toy_folder, data, out, "--batch-size", "1") == INTERRUPTED
    assert len(asked) == stop_at
    assert not (out / "strategies.md").exists()
    assert make("strategies", toy_folder, data, out, "--batch-size", "1") == 0
    assert len(asked) == 4 * 5, "four rows of five records, each asked once"
    # Full and PixelPrune are the same cells in every table.
    assert make("documents", toy_folder, data, out, "--batch-size", "1") == 0
    assert len(asked) == 4 * 5 + 3 * 5
    assert make("documents", toy_folder, data, out, "--batch-size", "1") == 0
    assert len(asked) == 4 * 5 + 3 * 5


def test_rows_and_records_can_be_fewer(toy_folder, asked, tmp_path):
    data = write_data(tmp_path)
    assert make("documents", toy_folder, data, tmp_path / "out", "--only", "PixelPrune", "Full", "--limit", "1") == 0
    content = json.loads((tmp_path / "out" / "documents.json").read_text())
    assert list(content["rows"]) == ["Full", "PixelPrune"]
    assert content["rows"]["Full"]["cells"]["docs"]["num"] == 1


def test_what_cannot_be_made_is_said(toy_folder, tmp_path, capsys):
    data = write_data(tmp_path)
    wrong = {
        ("grounding", "--model", str(toy_folder)): "expected full=FOLDER pruned=FOLDER",
        ("grounding", "--model", f"full={toy_folder}"): "also needs pruned=FOLDER",
        ("documents", "--model", str(toy_folder), "--depths", "1"): "for the table 'depth' and for no other",
        ("depth", "--model", str(toy_folder), "--depths", "99"): "--depth: expected a layer from -1",
        ("documents", "--model", str(toy_folder), "--only", "Best"): "--only: expected rows of",
    }
    for words, said in wrong.items():
        assert tables.main([*words, "--data", *data, "--out", str(tmp_path / "out")]) == 2
        assert said in " ".join(capsys.readouterr().err.split())


def test_an_average_needs_every_score():
    known, unknown = Cell(0.5, 0.4, 0.3, 10, 0), Cell(None, None, 0.3, 10, 1)
    assert mean_score([known, Cell(1.0, 1.0, 0.3, 1, 0)]) == 0.75
    assert mean_score([known, unknown]) is None
    text = markdown(TablePlan(1, "A title", (FULL,)), {"Full": {"a": known, "b": unknown}})
    assert "| Full | 50.0 (30.0) | - (30.0) | - |" in text
    assert "1 answers failed" in text
