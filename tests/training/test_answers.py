"""Answers of a model to train on: what a fresh teacher says of them, kills, ranks, samples, and what is written."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from pixelprune.pack import pack_samples
from pixelprune.records.prepare import PrepareSettings
from pixelprune.settings import PruneSettings
from tests.conftest import screen
from tests.ranks import ROOT
from tests.samples import write_jsonl
from training import answer
from training.composition.toy import build_toy_model
from training.config.recipe import load_recipe
from training.data.targets import TargetReader
from training.teacher.teachers import OnlineTeacher

NUM_QUESTIONS, LIMIT = 5, 6
SMALL = ["--max-new-tokens", str(LIMIT), "--batch-size", "2", "--part-size", "2", "--labelled", "answer"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Questions of uneven length about screens, one with earlier turns, a picture that is not there, one labelled."""
    folder = tmp_path_factory.mktemp("questions")
    rows = []
    for number in range(NUM_QUESTIONS):
        Image.fromarray(screen(2, 3 + number % 2, seed=number)).save(folder / f"{number}.png")
        image = {"type": "image", "image": f"{number}.png"}
        asked = {"role": "user", "content": [image, {"type": "text", "text": "Where is <image>?" + " now" * number}]}
        before = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}] if number == 1 else []
        rows.append({"messages": [*before, asked], "metadata": {"number": number}})
    rows.append({"messages": [{"role": "user", "content": [{"type": "image", "image": "gone.png"}]}]})
    rows.append({"messages": [{"role": "user", "content": "2?"}, {"role": "assistant", "content": "two"}]})
    return write_jsonl(folder / "questions.jsonl", rows)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory, data) -> Path:
    """A toy model whose answers depend on the prompt, and some of which end: an end token that it comes to."""
    folder = build_toy_model(tmp_path_factory.mktemp("answering") / "model")
    model = AutoModelForImageTextToText.from_pretrained(folder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embed_tokens" not in name:
                parameter.mul_(3)
    model.save_pretrained(folder)
    said = [row["messages"][-1]["token_ids"] for row in run(folder, data, folder.parent / "first", *SMALL)]
    counts = np.bincount(np.concatenate([ids[1:4] for ids in said]))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": int(counts.argmax())}))
    return folder


def recipe(model_path: Path, cache: Path, *more: str) -> list[str]:
    """Overrides of a recipe that learns from the model's answers, at the sizes of these screens."""
    return [f"model.path={model_path}", f"kd.cache_dir={cache}", "resize.min_pixels=1024", "kd.source=cached", *more]


def run(model_path: Path, data: Path, out: Path, *arguments: str, overrides: list[str] | None = None) -> list[dict]:
    """The rows that the command writes, as the only rank."""
    overrides = recipe(model_path, out.with_name(f"{out.name}-cache")) if overrides is None else overrides
    with_recipe = ["--recipe", "configs/kd_recovery_debug.yaml", "--set", *overrides] if overrides else []
    command = [str(model_path), "--data", str(data), "--out", str(out), *arguments, *with_recipe]
    assert answer.main(command) == 0
    return [json.loads(line) for line in (out / "answers" / "questions.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def greedy(model_path, data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("greedy") / "out"
    run(model_path, data, out, *SMALL)
    return out


def answers_apart_from_rounding(out: Path) -> tuple[list[dict], list[float], str]:
    """Rows without their log-probabilities, these, and what was refused. Another process adds up with other threads."""
    rows = rows_of(out)
    log_probs = [row["metadata"]["answer"].pop("log_prob") for row in rows if "answer" in row["metadata"]]
    return rows, log_probs, (out / "refused.jsonl").read_text()


def assert_the_same_answers(out: Path, other: Path) -> None:
    (rows, log_probs, refused), (rows2, log_probs2, refused2) = map(answers_apart_from_rounding, (out, other))
    assert (rows, refused) == (rows2, refused2)
    assert log_probs
    assert log_probs == pytest.approx(log_probs2, abs=1e-4)  # sums over answers, written with six decimals


def rows_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "answers" / "questions.jsonl").read_text().splitlines()]


def prepared(model_path: Path, data: Path, rows: list[dict], strategy: str = "none") -> list:
    config = load_recipe("configs/kd_recovery_debug.yaml", recipe(model_path, Path("unused")))
    preparer = PrepareSettings(str(model_path), PruneSettings(strategy), config.resize).build()
    return [preparer.prepare(row, data.parent, record_id=str(number)) for number, row in enumerate(rows)]


def test_log_probabilities_and_targets_are_those_of_a_fresh_teacher_pass(greedy, model_path, data, geometry):
    """In float32. Generation computes with a cache and padded rows, the teacher in one packed row: other matrix shapes
    round differently (1e-4 of hidden states of size 1)."""
    rows = rows_of(greedy)
    records = prepared(model_path, data, rows)
    model = AutoModelForImageTextToText.from_pretrained(model_path).eval()
    pack = pack_samples([record.sample for record in records], geometry)
    hidden = OnlineTeacher(model, model.lm_head, geometry).hidden(pack)
    log_probs = model.lm_head(hidden).detach().double().log_softmax(-1).gather(-1, pack.labels[:, None])[:, 0]
    (cache,) = greedy.with_name("out-cache").iterdir()
    targets, start = TargetReader(cache), 0
    for row, record in zip(rows, records, strict=True):
        ids = np.array(row["messages"][-1]["token_ids"])
        own = slice(start, start + len(ids))
        start += len(ids)
        assert pack.labels[own].tolist() == ids.tolist()
        assert row["metadata"]["answer"]["log_prob"] == pytest.approx(float(log_probs[own].sum()), abs=1e-3)
        kept = targets.read(record.content_hash, ids, record.sample.record_id)["hidden"]
        torch.testing.assert_close(kept, hidden[own], atol=1e-4, rtol=1e-4)
        assert model.lm_head(hidden[own]).argmax(-1).tolist() == ids.tolist(), "greedy"
    assert start == len(pack.labels)


def test_targets_are_found_by_the_student_that_sees_less(greedy, model_path, data):
    """The cache is of the content: a pruned sample of the same record finds the same entry, with the same ids."""
    (cache,) = greedy.with_name("out-cache").iterdir()
    for row, record in zip(rows_of(greedy), prepared(model_path, data, rows_of(greedy), "pred2d"), strict=True):
        labels = record.sample.input_ids[record.sample.supervised]
        assert labels.tolist() == row["messages"][-1]["token_ids"]
        assert len(TargetReader(cache).read(record.content_hash, labels, "")["hidden"]) == len(labels)


def test_the_end_token_belongs_to_an_answer_that_ended_and_to_no_other(greedy, model_path):
    (end,) = json.loads((model_path / "generation_config.json").read_text()).values()
    ended = []
    for row in rows_of(greedy):
        ids, facts = row["messages"][-1]["token_ids"], row["metadata"]["answer"]
        assert end not in ids[:-1]
        assert (ids[-1] == end) == facts["has_ended"]
        assert len(ids) == LIMIT or facts["has_ended"]
        ended.append(facts["has_ended"])
    assert True in ended
    summary = json.loads((greedy / "summary.json").read_text())
    assert summary["num_cut"] == ended.count(False)


def test_every_record_is_answered_or_listed(greedy):
    rows = rows_of(greedy)
    assert [row["metadata"].get("number") for row in rows] == [*range(NUM_QUESTIONS), None]
    (refused,) = [json.loads(line) for line in (greedy / "refused.jsonl").read_text().splitlines()]
    assert (refused["id"], refused["reason"]) == (f"questions:{NUM_QUESTIONS}", "missing_file")
    assert rows[1]["messages"][1]["weight"] == 0, "what the model was given is not trained on"
    assert rows[0]["messages"][0]["content"][1] == {"type": "text", "text": "Where is <image>?"}


@pytest.mark.ranks
def test_two_ranks_write_what_one_writes(greedy, model_path, data, tmp_path):
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--module"]
    options = ["--recipe", "configs/kd_recovery_debug.yaml", "--set", *recipe(model_path, tmp_path / "two-cache")]
    command = [*start, "training.answer", str(model_path), "--data", str(data), "--out", str(tmp_path / "two")]
    done = subprocess.run([*command, *SMALL, *options], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert_the_same_answers(tmp_path / "two", greedy)
    (cache,), (other,) = (tmp_path / "two-cache").iterdir(), greedy.with_name("out-cache").iterdir()
    assert sorted(path.name for path in cache.glob("shard-*")) == sorted(path.name for path in other.glob("shard-*"))
    for path in cache.glob("shard-*"):
        tensors, theirs = load_file(path), load_file(other / path.name)
        assert tensors.keys() == theirs.keys()
        for name, tensor in tensors.items():
            torch.testing.assert_close(tensor, theirs[name], atol=1e-4, rtol=1e-4, msg=name)


def test_a_killed_pass_goes_on_to_the_same_answers(greedy, model_path, data, tmp_path):
    """kill -9 as soon as a part is there; what was half written, and whether a second part was, does not matter."""
    out, cache = tmp_path / "out", tmp_path / "out-cache"
    options = ["--recipe", "configs/kd_recovery_debug.yaml", "--set", *recipe(model_path, cache)]
    command = [sys.executable, "-m", "training.answer", str(model_path), "--data", str(data), "--out", str(out)]
    process = subprocess.Popen([*command, *SMALL, *options], cwd=ROOT, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(out.glob("parts/part-*")):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    first = next(out.glob("parts/part-*"))
    stamp = first.stat().st_mtime_ns
    (out / "parts" / ".part-00000001.jsonl.partial").write_text('{"half')
    run(model_path, data, out, *SMALL)
    assert first.stat().st_mtime_ns == stamp, "made once"
    assert_the_same_answers(out, greedy)


def test_samples_are_drawn_from_their_seed(model_path, data, tmp_path):
    drawn = [*SMALL, "--num-samples", "2", "--temperature", "1"]
    first = run(model_path, data, tmp_path / "a", *drawn, overrides=[])
    second = run(model_path, data, tmp_path / "b", *drawn, overrides=[])
    other = run(model_path, data, tmp_path / "c", *drawn, "--seed", "1", overrides=[])
    assert len(first) == 2 * (NUM_QUESTIONS + 1)
    assert first == second != other
    assert [row["metadata"]["answer"]["sample"] for row in first[:4]] == [0, 1, 0, 1]
    answers = [[row["messages"][-1]["token_ids"] for row in first[i::2]] for i in (0, 1)]
    assert answers[0] != answers[1]


def test_labels_are_kept_or_left_out_and_tokens_weigh_what_the_model_gave_them(model_path, data, tmp_path):
    confident = [*SMALL[:-2], "--confidence"]
    kept = run(model_path, data, tmp_path / "kept", *confident, overrides=[])
    assert kept[-1]["messages"][-1] == {"role": "assistant", "content": [{"type": "text", "text": "two"}]}
    skipped = run(model_path, data, tmp_path / "skipped", *confident, "--labelled", "skip", overrides=[])
    assert skipped == kept[:-1]
    for row in skipped:
        weights, log_prob = row["messages"][-1]["token_weights"], row["metadata"]["answer"]["log_prob"]
        assert np.log(weights).sum() == pytest.approx(log_prob, abs=0.02)  # six digits are written
    (sample, *_) = (record.sample for record in prepared(model_path, data, skipped))
    assert sample.loss_weight == pytest.approx(sum(skipped[0]["messages"][-1]["token_weights"]), rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-samples", "2"], "--num-samples: 2 greedy answers are all the same"),
        (["--top-p", "0"], "--top-p: expected a number > 0"),
        (["--batch-size", "0"], "--batch-size: expected at least 1, got 0"),
        (["--set", "a=b"], "--set: a=b is of a recipe"),
        (["--recipe", "configs/kd_recovery_debug.yaml"], "runs/toy teaches, "),
        (["--recipe", "configs/debug.yaml"], "loss.kd_weight is 0"),
    ],
)
def test_what_cannot_be_is_refused(arguments, message, toy_folder, data, tmp_path, capsys):
    command = [str(toy_folder), "--data", str(data), "--out", str(tmp_path / "out"), *arguments]
    assert answer.main(command) == 2
    assert message in capsys.readouterr().err


def test_another_pass_is_not_continued(greedy, model_path, data, tmp_path, capsys):
    out = shutil.copytree(greedy, tmp_path / "out")
    command = [str(model_path), "--data", str(data), "--out", str(out), *SMALL, "--temperature", "1"]
    assert answer.main(command) == 2
    assert "holds answers made with another resize, sampling, targets" in capsys.readouterr().err
    assert_the_same_answers(out, greedy)
