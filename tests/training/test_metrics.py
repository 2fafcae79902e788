"""One row of the table shows a number everywhere: the live line, the report's table and pictures, the model card."""

from __future__ import annotations

import json

import pytest
from rich.console import Console

from tests.training.test_grounding import predictions
from tests.training.test_meter import steps_of
from training.checkpoint import export
from training.checkpoint.checkpointer import RunState
from training.checkpoint.export import run_facts
from training.evaluation import during_training
from training.tracking import metrics, report
from training.tracking.metrics import METRICS, Metric, live_line, values_of

NEW = Metric("warmth", "warmth, K", "warmth {:.1f}", {"warmest": max}, picture="weather", in_card=True)


@pytest.fixture
def with_new(monkeypatch):
    for module in (metrics, report, export):
        monkeypatch.setattr(module, "METRICS", (*METRICS, NEW))
    monkeypatch.setattr(report, "PICTURES", (*metrics.PICTURES, "weather"))


def test_a_new_row_shows_everywhere(with_new, tmp_path, capsys):
    rows = [{"step": step, "loss": 3.0 - step, "warmth": value} for step, value in ((1, 4.0), (2, None), (3, 2.5))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert live_line(rows[0]) == "loss 2.0000  warmth 4.0"
    report.report([tmp_path], tmp_path, Console(width=200))
    assert "weather.png" in capsys.readouterr().out
    assert (tmp_path / "weather.png").exists()
    assert report.summarise(rows) == {"steps": 3, "first loss": 2.0, "last loss": 0.0, "warmest": 4.0}
    assert run_facts(tmp_path, RunState(step=2))["warmth, K"] == "4.0000", "of the steps up to the checkpoint's"


def test_what_is_shown_is_what_is_measured():
    """Every name of the table is a key that the meter or an evaluation writes."""
    of_a_step = set(next(steps_of(pause=0.0)))
    evaluated = {"eval_loss", "eval_token_accuracy"}  # held_out_loss.py; on two ranks in test_train.py
    for suffix in ("", "_full"):
        evaluated |= set(during_training._metrics(predictions(), suffix))
    # mfu: of known devices alone; the others: of steps with an answer of the student, in test_on_policy.py
    of_some = {"mfu", "on_policy_share", "on_policy_tokens"}
    assert {metric.name for metric in METRICS} - of_some <= of_a_step | evaluated


def test_an_evaluation_says_its_own_numbers():
    said = live_line({"eval_loss": 1.25, "eval_token_accuracy": 0.5, "eval_accuracy": 0.75, "eval_accuracy_full": 1.0})
    assert said == "held-out loss 1.2500  accuracy 0.7500  on all tokens 1.0000"


def test_a_run_is_summed_up_by_values_that_are_there():
    rows = [{"step": n, "loss": None, "step_s": s} for n, s in enumerate((3.0, 1.0, 2.0, 9.0), start=1)]
    assert values_of("loss", rows) == []
    summed = report.summarise(rows)
    assert summed == {"steps": 4, "steps without a loss": 4, "step s": 3.0}, "a median that was measured"


def test_names_are_given_once():
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    rows = [row for metric in METRICS for row in metric.summary]
    assert len(set(rows)) == len(rows)
