"""The command line as a user meets it: a whole run on two ranks, and mistakes that end with one clear line."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from tests.conftest import screen
from tests.training.debug_run import call, held_out_loss, overrides
from training.tracking.tracker import read_metrics


@pytest.fixture(scope="module")
def finished_run(data, toy_folder, tmp_path_factory) -> Path:
    """The debug recipe on two real ranks, with wandb offline."""
    runs = tmp_path_factory.mktemp("runs")
    more = overrides(data, toy_folder, runs, "schedule.max_steps=6", "tracking.wandb=offline")
    done = call("launch", "configs/debug.yaml", *more, "--ranks", "2")
    assert done.returncode == 0, done.stderr[-4000:]
    return runs / "debug"


@pytest.mark.ranks
def test_a_run_learns_and_writes_its_metrics(finished_run):
    rows = read_metrics(finished_run)
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 7))
    assert all(row["num_samples"] == 6 for row in steps)
    held_out = [row for row in rows if "eval_loss" in row]
    assert [row["step"] for row in held_out] == [0, 6]
    assert held_out[-1]["eval_loss"] < held_out[0]["eval_loss"]
    assert 0 < steps[-1]["retain_ratio"] < 1
    assert {"lr_vit", "grad_norm", "samples_per_s", "data_wait_share", "peak_memory_gb"} <= steps[0].keys()
    assert list((finished_run / "wandb").glob("offline-run-*")), "wandb keeps an offline copy"


@pytest.mark.ranks
def test_other_launchers_train_the_same(finished_run, data, toy_folder, tmp_path):
    """torchrun here; the recipe sees no difference but the missing arguments."""
    settings = overrides(data, toy_folder, tmp_path, "schedule.max_steps=6", "checkpoint.export_at_end=false")
    ranks = ["--standalone", "--nproc-per-node", "2", "-m", "training.train"]
    done = call("torch.distributed.run", *ranks, "configs/debug.yaml", *settings)
    assert done.returncode == 0, done.stderr[-4000:]
    theirs = [row["loss"] for row in read_metrics(tmp_path / "debug") if "loss" in row]
    # Threads per rank differ between launchers, and with them the order of sums.
    assert theirs == pytest.approx([row["loss"] for row in read_metrics(finished_run) if "loss" in row], rel=1e-5)
    wrong = call("torch.distributed.run", *ranks, "configs/debug.yaml", *settings, "optim.learning=1")
    assert wrong.stderr.count("error: command line: unknown key 'optim.learning'") == 1


@pytest.mark.ranks
def test_the_exported_folder_is_the_trained_model(finished_run, data):
    """Loaded by `from_pretrained`, it has the held-out loss that the run reported for its last step."""

    reported = [row["eval_loss"] for row in read_metrics(finished_run) if "eval_loss" in row][-1]
    assert held_out_loss(finished_run / "export", data) == pytest.approx(reported, rel=1e-5)
    card = (finished_run / "export" / "README.md").read_text()
    assert f"| held-out cross-entropy per token | {reported:.4f} |" in card
    assert "| samples seen | 36 |" in card
    settings = json.loads((finished_run / "export" / "pixelprune.json").read_text())
    assert settings["prune"]["strategy"] == "pred2d"
    assert settings["resize"]["min_pixels"] == 1024


def test_export_gives_the_same_logits_as_the_model_in_memory(toy_model, toy_folder, toy_tokenizer, geometry, tmp_path):
    from transformers import AutoModelForImageTextToText

    from pixelprune.model_folder import PRUNE_FILE, read_prune_file
    from pixelprune.pack import model_inputs, pack_samples
    from pixelprune.settings import PruneSettings, ResizeSettings
    from tests.pixelprune.reference import make_sample
    from training.checkpoint.export import export_model
    from training.config.settings import Config, ModelSettings
    from training.data.settings import DataSettings
    from training.model.loading import load_model_files

    config = Config(
        prune=PruneSettings("serpentine", "mae", 0.02),
        resize=ResizeSettings(2048, 4096),
        data=DataSettings(grounding_tokens=True),
    )
    files = load_model_files(ModelSettings(path=str(toy_folder)))
    folder = export_model(tmp_path / "export", toy_model, files, config, {"steps": 1})
    again = AutoModelForImageTextToText.from_pretrained(folder).eval()
    # The direction that auto came to, every turn being supervised.
    trained = dataclasses.replace(config.prune, direction="forward")
    assert read_prune_file((folder / PRUNE_FILE).read_text()) == (trained, config.resize, True)
    inputs = model_inputs(
        pack_samples([make_sample(toy_tokenizer, [screen(3, 5)], "Where?", "(5, 8)")], geometry),
        geometry,
        torch.float32,
    )
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, toy_model(**inputs).logits)


LATE_FIRST_RANK = """
import os, runpy, sys, time
time.sleep(3 * (os.environ["LOCAL_RANK"] == "0"))
sys.argv = ["train", "configs/debug.yaml", "optim.learning=1"]
sys.path.insert(0, "")
runpy.run_module("training.train", run_name="__main__")
"""


@pytest.mark.ranks
def test_the_rank_that_speaks_is_not_ended_before_it_has(tmp_path):
    """torchrun ends all ranks as soon as one fails: the silent ones wait for the one that says why."""
    (tmp_path / "late.py").write_text(LATE_FIRST_RANK)
    done = call("torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(tmp_path / "late.py"))
    assert done.stderr.count("error: command line: unknown key 'optim.learning'") == 1


BAD_CALLS = {
    "unknown key": (["optim.learning_rate=1"], "unknown key 'optim.learning_rate'"),
    "wrong type": (["optim.lr=fast"], "optim.lr: expected a number, got 'fast'"),
    "missing model folder": (["model.path=/no/such/model"], "model.path: no such model folder: /no/such/model"),
}


def assert_one_line_error(done: subprocess.CompletedProcess, message: str) -> None:
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2, done.stderr[-2000:]
    assert len(errors) == 1, done.stderr[-2000:]
    assert message in errors[0]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("case", BAD_CALLS)
def test_a_wrong_recipe_ends_with_one_line(case, data, toy_folder, tmp_path):
    more, message = BAD_CALLS[case]
    arguments = [*overrides(data, toy_folder, tmp_path), *more]
    assert_one_line_error(call("launch", "configs/debug.yaml", *arguments, "--ranks", "1"), message)


def test_a_missing_image_ends_with_one_line_naming_it(data, toy_folder, tmp_path):
    for path in data.iterdir():
        if path.is_file():
            shutil.copy(path, tmp_path)
    (tmp_path / "train3.png").unlink()
    arguments = overrides(tmp_path, toy_folder, tmp_path / "runs")
    done = call("launch", "configs/debug.yaml", *arguments, "--ranks", "1")
    assert_one_line_error(done, "train3.png")
    assert "1 missing_file" in done.stderr
    assert "data.max_quarantined_share" in done.stderr


def test_a_file_without_records_ends_with_one_line(toy_folder, tmp_path):
    (tmp_path / "train.jsonl").write_text("")
    (tmp_path / "eval.jsonl").write_text("")
    arguments = overrides(tmp_path, toy_folder, tmp_path / "runs")
    done = call("launch", "configs/debug.yaml", *arguments, "--ranks", "1")
    assert_one_line_error(done, "train.jsonl")


def test_training_without_a_launcher_says_how_to_start_it(data, toy_folder, tmp_path):
    done = call("training.train", "configs/debug.yaml", *overrides(data, toy_folder, tmp_path))
    assert_one_line_error(done, "python -m launch RECIPE")


def test_show_prints_the_resolved_recipe(data, toy_folder, tmp_path):
    done = call("training.train", "configs/debug.yaml", *overrides(data, toy_folder, tmp_path), "--show")
    assert done.returncode == 0
    assert f"path: {toy_folder}" in done.stdout
