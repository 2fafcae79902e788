"""Tables and pictures of runs that were not as they should be."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from tests.ranks import ROOT
from training.report import main
from training.tracking.report import plot_convergence, summarise

SPEEDS = {"retain_ratio": 0.5, "samples_per_s": 2.0, "kept_tokens_per_s": 9.0, "step_s": 0.5, "data_wait_share": 0.1}


def rows(*losses: float | None, **more: float) -> list[dict]:
    return [
        {"step": step, "loss": loss, "peak_memory_gb": 1.0, **SPEEDS, **more}
        for step, loss in enumerate(losses, start=1)
    ]


def write_run(folder: Path, content: list[dict]) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    return folder


def test_a_diverged_run_has_a_table(tmp_path, capsys):
    run = write_run(tmp_path / "diverged", [*rows(None, 2.5, 2.25, None), {"step": 4, "eval_loss": None}])
    assert main([str(run)]) == 0
    lines = [line.split("│")[1:3] for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    table = {name.strip(): value.strip() for name, value in lines}
    assert table["first loss"] == "2.5"
    assert table["last loss"] == "2.25"
    assert table["steps without a loss"] == "2"
    assert table["steps"] == "4"


def test_a_run_of_skipped_steps_alone_has_no_loss():
    assert "first loss" not in summarise(rows(None, None))


def test_runs_of_one_name_stand_side_by_side(tmp_path, capsys):
    first = write_run(tmp_path / "a" / "run", rows(3.0))
    second = write_run(tmp_path / "b" / "run", rows(1.0))
    assert main([str(first), str(second), "-o", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "a/run" in out
    assert "b/run" in out


@pytest.mark.parametrize(("more", "drawn"), [({"ce": 1.5}, 1.5), ({}, 4.0)])
def test_the_curve_is_cross_entropy_also_when_distilled(tmp_path, monkeypatch, more, drawn):
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: figures.append(figure))
    plot_convergence({"run": rows(4.0, 4.0, **more)}, tmp_path / "out.png")
    axes = figures[0].axes[0]
    assert "cross-entropy" in axes.get_ylabel()
    assert list(axes.lines[0].get_ydata()) == [drawn, drawn]


def table_of(output: str) -> dict[str, str]:
    lines = [line.split("│")[1:3] for line in output.splitlines() if line.startswith("│")]
    return {name.strip(): value.strip() for name, value in lines}


def test_one_evaluation_is_not_said_to_be_two(tmp_path, capsys):
    run = write_run(tmp_path / "once", [*rows(2.5, 2.25), {"step": 2, "eval_loss": 2.0, "eval_accuracy": 0.5}])
    assert main([str(run)]) == 0
    once = table_of(capsys.readouterr().out)
    assert {name: once[name] for name in once if "held-out" in name} == {"last held-out loss": "2"}
    assert {name: once[name] for name in once if "accuracy" in name} == {"last grounding accuracy": "0.5"}
    evaluated = [{"step": step, "eval_loss": 3.0 - step} for step in (0, 1, 2)]
    assert main([str(write_run(tmp_path / "thrice", [*rows(2.5, 2.25), *evaluated]))]) == 0
    thrice = table_of(capsys.readouterr().out)
    assert (thrice["first held-out loss"], thrice["last held-out loss"]) == ("3", "1")


def test_a_piped_table_is_whole(tmp_path, capsys):
    names = [f"a-run-with-a-rather-long-name-number-{number}" for number in range(6)]
    assert main([str(write_run(tmp_path / name, rows(2.5))) for name in names]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in names)
    assert "…" not in said
    assert all(name in next(line for line in said.splitlines() if names[0] in line) for name in names), "in one line"


def test_a_table_does_not_wait_for_torch(tmp_path):
    run = write_run(tmp_path / "run", rows(2.5, 2.25))
    code = "import sys; from training.report import main; main(sys.argv[1:]); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code, str(run)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
