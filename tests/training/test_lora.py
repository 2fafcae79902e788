"""Adapters: only they are trained, and both ways of exporting give the model that was trained."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.training.debug_run import call, held_out_loss, overrides
from training.tracking import read_metrics


@pytest.fixture(scope="module")
def lora_run(data, toy_folder, tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    more = ["lora.rank=4", "lora.vit=true", "schedule.max_steps=3", "optim.lr=1e-2", "eval.at_start=false"]
    done = call("launch", "configs/debug.yaml", *overrides(data, toy_folder, runs, *more), "--ranks", "1")
    assert done.returncode == 0, done.stderr[-4000:]
    return runs / "debug"


def test_only_adapted_weights_change(lora_run, toy_folder):
    before = load_file(toy_folder / "model.safetensors")
    after = load_file(lora_run / "export" / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    projections = ("_proj.weight", "qkv.weight", "proj.weight", "linear_fc1.weight", "linear_fc2.weight")
    assert all(name.endswith(projections) for name in changed), changed
    assert not any("merger" in name or "embed" in name for name in changed)
    assert any("visual.blocks" in name for name in changed)


def test_the_merged_export_has_the_reported_loss(lora_run, data):
    reported = [row["eval_loss"] for row in read_metrics(lora_run) if "eval_loss" in row][-1]
    assert held_out_loss(lora_run / "export", data) == pytest.approx(reported, rel=1e-4)


def test_exporting_the_checkpoint_gives_the_same_bits(lora_run, tmp_path):
    done = call("training.export", str(lora_run), "-o", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr[-2000:]
    expected = load_file(lora_run / "export" / "model.safetensors")
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert expected.keys() == exported.keys()
    assert all(torch.equal(expected[name], exported[name]) for name in expected)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| optimizer steps | 3 |" in card
    state = json.loads(next((lora_run / "checkpoints").glob("step-*/state.json")).read_text())
    assert state["totals"]["num_samples"] == 18


def test_exporting_nothing_ends_with_one_line(tmp_path):
    done = call("training.export", str(tmp_path), "-o", str(tmp_path / "out"))
    assert done.returncode == 2
    assert "expected a complete checkpoint" in done.stderr
