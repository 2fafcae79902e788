"""metrics.jsonl after a resume and after a kill, and wandb that cannot reach its server."""

from __future__ import annotations

import json
import logging
import math

import pytest

from training.config.settings import TrackingSettings
from training.tracking import wandb_mirror
from training.tracking.tracker import Tracker, read_metrics

DISABLED = TrackingSettings(wandb="disabled")


def test_rows_after_the_restored_step_are_cut_off(tmp_path):
    rows = [{"step": step, "loss": 1.0 / step} for step in range(1, 6)] + [{"step": 3, "eval_loss": 0.5}]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 6, "lo')
    tracker = Tracker(tmp_path, DISABLED, "run", {}, restored_step=3)
    assert tracker.has_evaluation(3)
    assert not tracker.has_evaluation(5)
    tracker.log(4, {"loss": math.nan})
    tracker.close()
    assert [(row["step"], row.get("loss", "eval")) for row in read_metrics(tmp_path)] == [
        (1, 1.0),
        (2, 0.5),
        (3, 1 / 3),
        (3, "eval"),
        (4, None),
    ]


def test_a_new_run_keeps_no_old_rows(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n')
    Tracker(tmp_path, DISABLED, "run", {}).close()
    assert read_metrics(tmp_path) == []


@pytest.mark.parametrize("mode", ["online", "auto"])
def test_wandb_without_its_server_costs_no_row(tmp_path, monkeypatch, caplog, mode):
    monkeypatch.setattr(wandb_mirror, "_INIT_SECONDS", 3)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    with caplog.at_level(logging.INFO):
        tracker = Tracker(tmp_path, TrackingSettings(wandb=mode), "run", {"optim": {"lr": 1e-3}}, run_id="abc")
        for step in range(1, 4):
            tracker.log(step, {"loss": 1.0 / step})
        tracker.close()
    assert "online mode failed" in caplog.text
    assert "wandb: offline" in caplog.text
    assert len(read_metrics(tmp_path)) == 3
    assert list((tmp_path / "wandb").glob("offline-run-*-abc/run-abc.wandb"))
