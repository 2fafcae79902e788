"""A dry run finds what would end a start, without a GPU and without training."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.__main__ import main

RECIPE = "configs/debug.yaml"


@pytest.fixture
def start(toy_folder, tmp_path):
    def start(*overrides: str) -> int:
        own = [f"model.path={toy_folder}", f"run.folder={tmp_path}", f"data.index_dir={tmp_path}"]
        return main([RECIPE, *own, *overrides, "--ranks", "2", "--dry-run"])

    return start


def test_it_says_what_was_found_beside_the_command(start, capsys, tmp_path):
    assert start() == 0
    out, err = capsys.readouterr()
    assert "--module training.train" in out
    said = " ".join(err.replace("│", " ").split())
    assert "360 records; of 8 sampled" in said
    assert "of the blocks kept" in said
    assert "GB at full packs" in said
    assert "recomputing ViT every layer, LLM every layer" in said
    assert not (tmp_path / "debug").exists(), "a dry run leaves no run behind"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.learning_rte=1", "did you mean 'optim.lr'"),
        ("model.path=/nowhere/model", "model.path: no such model folder: /nowhere/model"),
        ("data.sources.0.path=data_tools/samples/trian.jsonl", "did you mean data_tools/samples/train.jsonl?"),
        ("data.eval_sources.0.path=/nowhere/eval.jsonl", "source /nowhere/eval.jsonl: there is no /nowhere"),
    ],
)
def test_mistakes_that_would_end_a_start_are_one_line(start, capsys, override, message):
    assert start(override) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_a_missing_recipe_is_one_line(capsys):
    assert main(["configs/nowhere.yaml", "--dry-run"]) == 2
    assert capsys.readouterr().err == "error: configs/nowhere.yaml: no such recipe\n"


def test_records_that_cannot_be_used_are_said(start, capsys, tmp_path):
    good = Path("data_tools/samples/train.jsonl").read_text().partition("\n")[0]
    path = tmp_path / "mixed.jsonl"
    path.write_text("not JSON\n")
    assert start(f"data.sources.0.path={path}") == 2
    assert "none of 1 sampled records can be used" in capsys.readouterr().err
    path.write_text("\n".join(["not JSON", good]) + "\n")
    assert start(f"data.sources.0.path={path}", "data.sources.0.root=data_tools/samples") == 0
    assert "1 of them would be quarantined" in " ".join(capsys.readouterr().err.replace("│", " ").split())
