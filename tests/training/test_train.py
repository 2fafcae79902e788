"""The command line as a user meets it: a whole run on two ranks, and mistakes that end with one clear line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.conftest import screen
from tests.ranks import ROOT
from training.tracking import read_metrics

NUM_TRAIN, NUM_EVAL = 12, 4


def write_records(folder: Path, split: str, number: int) -> Path:
    path = folder / f"{split}.jsonl"
    with path.open("w") as file:
        for i in range(number):
            image = f"{split}{i}.png"
            Image.fromarray(screen(3, 4 + i % 3, i + 100 * (split == "eval"))).save(folder / image)
            content = [{"type": "image", "image": image}, {"type": "text", "text": f"Where is item {i}?"}]
            messages = [{"role": "user", "content": content}, {"role": "assistant", "content": f"({37 * i}, 8)"}]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_records(folder, "train", NUM_TRAIN)
    write_records(folder, "eval", NUM_EVAL)
    return folder


def overrides(data: Path, model: Path, runs: Path, *more: str) -> list[str]:
    return [
        f"model.path={model}",
        f"data.sources.0.path={data / 'train.jsonl'}",
        f"data.eval_sources.0.path={data / 'eval.jsonl'}",
        f"run.folder={runs}",
        "resize.min_pixels=1024",
        "data.samples_per_step=6",
        *more,
    ]


def call(module: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


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
def test_the_exported_folder_is_the_trained_model(finished_run, data):
    """Loaded by `from_pretrained`, it has the held-out loss that the run reported for its last step."""
    from transformers import AutoModelForImageTextToText

    from pixelprune.pack import VisionGeometry, model_inputs
    from pixelprune.settings import PruneSettings, ResizeSettings
    from training.data.collator import PixelPruneCollator

    model = AutoModelForImageTextToText.from_pretrained(finished_run / "export").eval()
    collator = PixelPruneCollator.from_pretrained(
        str(finished_run / "export"), prune=PruneSettings(), resize=ResizeSettings(min_pixels=1024), root=data
    )
    records = [json.loads(line) for line in (data / "eval.jsonl").read_text().splitlines()]
    pack = collator.pack([collator.preparer.prepare(record, data).sample for record in records])
    inputs = model_inputs(pack, VisionGeometry.from_config(model.config), torch.float32)
    with torch.no_grad():
        logits = model(**inputs, logits_to_keep=pack.logit_index).logits[0]
    loss = torch.nn.functional.cross_entropy(logits, pack.labels).item()
    reported = [row["eval_loss"] for row in read_metrics(finished_run) if "eval_loss" in row][-1]
    assert loss == pytest.approx(reported, rel=1e-5)
    settings = json.loads((finished_run / "export" / "pixelprune.json").read_text())
    assert settings["prune"]["strategy"] == "pred2d"
    assert settings["resize"]["min_pixels"] == 1024


def test_export_gives_the_same_logits_as_the_model_in_memory(toy_model, toy_folder, toy_tokenizer, geometry, tmp_path):
    from transformers import AutoModelForImageTextToText

    from pixelprune.pack import model_inputs, pack_samples
    from pixelprune.settings import PruneSettings, ResizeSettings
    from tests.pixelprune.reference import make_sample
    from training.config import ModelSettings
    from training.export import export_model
    from training.model import load_model_files

    files = load_model_files(ModelSettings(path=str(toy_folder)))
    folder = export_model(tmp_path / "export", toy_model, files, PruneSettings(), ResizeSettings(), {"steps": 1})
    again = AutoModelForImageTextToText.from_pretrained(folder).eval()
    inputs = model_inputs(
        pack_samples([make_sample(toy_tokenizer, [screen(3, 5)], "Where?", "(5, 8)")], geometry),
        geometry,
        torch.float32,
    )
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, toy_model(**inputs).logits)


BAD_CALLS = {
    "unknown key": (["optim.learning_rate=1"], "unknown key 'optim.learning_rate'"),
    "wrong type": (["optim.lr=fast"], "optim.lr: Value 'fast'"),
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
    assert_one_line_error(call("training.train", "configs/debug.yaml", *arguments), message)


def test_a_missing_image_ends_with_one_line_naming_it(data, toy_folder, tmp_path):
    for path in data.iterdir():
        if path.is_file():
            shutil.copy(path, tmp_path)
    (tmp_path / "train3.png").unlink()
    done = call("training.train", "configs/debug.yaml", *overrides(tmp_path, toy_folder, tmp_path / "runs"))
    assert_one_line_error(done, "train3.png")
    assert "1 missing_file" in done.stderr
    assert "data.max_quarantined_share" in done.stderr


def test_a_file_without_records_ends_with_one_line(toy_folder, tmp_path):
    (tmp_path / "train.jsonl").write_text("")
    (tmp_path / "eval.jsonl").write_text("")
    done = call("training.train", "configs/debug.yaml", *overrides(tmp_path, toy_folder, tmp_path / "runs"))
    assert_one_line_error(done, "train.jsonl")


def test_show_prints_the_resolved_recipe(data, toy_folder, tmp_path):
    done = call("training.train", "configs/debug.yaml", *overrides(data, toy_folder, tmp_path), "--show")
    assert done.returncode == 0
    assert f"path: {toy_folder}" in done.stdout
