"""Grounding evaluation inside a run: reported like the command's, best kept, and training none the wiser."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pixelprune.prompter import Prompter
from pixelprune.settings import PruneSettings, ResizeSettings
from tests.ranks import ROOT
from tests.training.test_evaluate import write_eval
from training import evaluate
from training.config.recipe import load_recipe
from training.config.settings import EvalSettings
from training.data.settings import DataSettings, SourceSettings
from training.distributed.ranks import Ranks
from training.errors import UserError
from training.evaluation.during_training import GroundingEvaluator
from training.tracking.tracker import read_metrics

NUM_STEPS = 4


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Records that are trained on and answered; every box is the whole image, so that some answers hit."""
    folder = tmp_path_factory.mktemp("data")
    path = write_eval(folder)
    lines = path.read_text().splitlines()
    (folder / "train.jsonl").write_text("\n".join([*lines[:6], lines[8]]) + "\n")
    (folder / "eval.jsonl").write_text("\n".join(lines[:6]) + "\n")
    return folder


def train(data: Path, model: Path, runs: Path, name: str, *more: str) -> Path:
    overrides = [
        f"model.path={model}",
        f"data.sources.0.path={data / 'train.jsonl'}",
        f"data.eval_sources.0.path={data / 'eval.jsonl'}",
        f"run.folder={runs}",
        f"run.name={name}",
        "resize.min_pixels=1024",
        "data.samples_per_step=4",
        f"schedule.max_steps={NUM_STEPS}",
        "optim.lr=1e-2",
        *more,
    ]
    command = [sys.executable, "-m", "launch", "configs/debug.yaml", *overrides, "--ranks", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return runs / name


@pytest.mark.ranks
def test_evaluating_changes_nothing_and_keeps_the_best_model(data, toy_folder, tmp_path):
    plain = train(data, toy_folder, tmp_path, "plain")
    run = train(
        data, toy_folder, tmp_path, "grounded", "eval.grounding_every_steps=2", "eval.grounding_on_full=true",
        "eval.grounding_max_new_tokens=12",
    )  # fmt: skip
    losses = [[row["loss"] for row in read_metrics(folder) if "loss" in row] for folder in (plain, run)]
    assert losses[0] == losses[1]

    rows = {row["step"]: row for row in read_metrics(run) if "eval_accuracy" in row}
    assert sorted(rows) == [2, 4]
    assert {"eval_accuracy_full", "eval_accuracy_text", "eval_accuracy_icon", "eval_failed_share"} <= rows[2].keys()
    assert rows[4]["eval_retain_ratio"] < rows[4]["eval_retain_ratio_full"] == 1
    assert rows[4]["eval_failed_share"] == 0
    state = json.loads((run / "grounding.json").read_text())
    assert state["evaluated_steps"] == [2, 4]
    best = max(rows, key=lambda step: (rows[step]["eval_accuracy"], -step))
    assert (state["best_step"], state["best_accuracy"]) == (best, rows[best]["eval_accuracy"])

    # The command finds on the exported best model what the run reported, answer by answer.
    out = tmp_path / "out"
    command = [str(run / "best"), "--data", str(data / "eval.jsonl"), "--out", str(out), "--max-new-tokens", "12"]
    assert evaluate.main(command) == 0
    for mode, suffix in (("pruned", ""), ("full", "_full")):
        stored = (run / "grounding" / f"step-{best:08d}{suffix}.jsonl").read_text().splitlines()
        again = (out / mode / "predictions.jsonl").read_text().splitlines()
        texts = [[json.loads(line)["text"] for line in lines] for lines in (stored, again)]
        assert texts[0] == texts[1]
        result = json.loads((out / mode / "result.json").read_text())
        assert result["overall"]["all"]["accuracy"] == rows[best][f"eval_accuracy{suffix}"]


def test_data_without_boxes_is_refused(data, toy_folder, tmp_path):
    (tmp_path / "eval.jsonl").write_text((data / "train.jsonl").read_text().splitlines()[-1] + "\n")

    held_out = DataSettings(eval_sources=[SourceSettings(str(tmp_path / "eval.jsonl"))])
    ranks = Ranks(0, 1, 0, torch.device("cpu"))
    prompter = Prompter.load(toy_folder, prune=PruneSettings(), resize=ResizeSettings())
    with pytest.raises(UserError, match=r"no record can be answered: no metadata\.bbox"):
        GroundingEvaluator.build(EvalSettings(), held_out, prompter, ranks, tmp_path, seed=0)


@pytest.mark.parametrize("suffix", ["", "_debug"])
def test_the_full_recipe_differs_in_pruning_alone(suffix):
    pruned, full = (load_recipe(f"configs/{name}{suffix}.yaml") for name in ("gui_grounding", "gui_grounding_full"))
    assert pruned.data == full.data
    assert pruned.data.paired, "both see the same samples in the same step"
    assert (pruned.prune.strategy, full.prune.strategy) == ("pred2d", "none")
    for section in ("model", "resize", "loss", "optim", "schedule"):
        assert getattr(pruned, section) == getattr(full, section)


def test_the_paper_s_numbers():
    config = load_recipe("configs/gui_grounding.yaml")
    assert (config.data.samples_per_step, config.schedule.max_steps) == (32 * 18, 4000)
    assert config.prune == PruneSettings("pred2d", "max", 0.0)
