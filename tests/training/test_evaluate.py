"""Evaluation passes: answers are those of `generate`, batches and ranks change nothing, failures stay failures."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from pixelprune.hf import generate, prepare
from pixelprune.prompter import Prompter
from pixelprune.settings import PruneSettings, ResizeSettings
from tests.conftest import screen
from tests.ranks import ROOT
from training import answering, evaluate
from training.answering import AnswerSettings, predict, read_tasks
from training.data.settings import SourceSettings
from training.grounding import Prediction
from training.prediction_files import PredictionFiles

NUM_GOOD = 6
SMALL = ["--min-pixels", "1024", "--max-new-tokens", "6"]


def write_eval(folder: Path) -> Path:
    """Six good records of several sizes; one with a missing image, one of another size than stated, one without box."""
    path = folder / "eval.jsonl"
    rows = []
    for number in range(NUM_GOOD):
        pixels = screen(3 + number % 2, 4 + number % 3, seed=number)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        size = [pixels.shape[1], pixels.shape[0]]
        metadata = {"bbox": [0, 0, *size], "image_size": size, "element": "icon" if number % 2 else "text"}
        rows.append((f"{number}.png", metadata | {"subset": f"s{number % 3}"}))
    rows.append(("gone.png", {"bbox": [0, 0, 9, 9]}))
    rows.append(("0.png", {"bbox": [0, 0, 9, 9], "image_size": [7, 7]}))
    rows.append(("1.png", {}))
    with path.open("w") as file:
        for number, (image, metadata) in enumerate(rows):
            content = [{"type": "image", "image": image}, {"type": "text", "text": f"Where is item {number}, please?"}]
            messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "(1, 1)"}]
            file.write(json.dumps({"messages": messages, "metadata": metadata}) + "\n")
    return path


@pytest.fixture(scope="module")
def eval_path(tmp_path_factory) -> Path:
    return write_eval(tmp_path_factory.mktemp("eval"))


@pytest.fixture(scope="module")
def lively(toy_model):
    """The toy model with larger weights: its answers depend on the prompt."""
    model = copy.deepcopy(toy_model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embed_tokens" not in name:
                parameter.mul_(3)
    return model


@pytest.fixture(scope="module")
def lively_folder(lively, toy_folder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lively") / "model"
    shutil.copytree(toy_folder, folder)
    lively.save_pretrained(folder)
    return folder


@pytest.fixture
def prompter(toy_folder) -> Prompter:
    return Prompter.load(str(toy_folder), prune=PruneSettings(), resize=ResizeSettings(min_pixels=1024))


def answers(model, prompter, path: Path, batch_size: int) -> list[Prediction]:
    tasks, _ = read_tasks([SourceSettings(str(path))])
    settings = AnswerSettings(max_new_tokens=6, batch_size=batch_size)
    return [one for batch in predict(model, prompter, tasks, settings) for one in batch]


def without_times(prediction: Prediction) -> dict:
    return {key: value for key, value in vars(prediction).items() if key != "first_token_s"}


def test_answers_are_those_of_generate_on_the_question_alone(lively, prompter, eval_path):
    found = answers(lively, prompter, eval_path, batch_size=1)
    for number in range(NUM_GOOD):
        content = [
            {"type": "image", "image": str(eval_path.parent / f"{number}.png")},
            {"type": "text", "text": f"Where is item {number}, please?"},
        ]
        inputs = prepare(prompter, [{"role": "user", "content": content}])
        expected = generate(lively, inputs, max_new_tokens=6, do_sample=False)
        assert found[number].text == expected.text
        assert found[number].num_generated == len(expected.token_ids[0])
        assert (found[number].kept_blocks, found[number].full_blocks) == (inputs.num_kept_blocks, inputs.num_blocks)
        assert found[number].first_token_s > 0
    assert len({prediction.text for prediction in found[:NUM_GOOD]}) > 1, "answers of different records differ"


def test_batches_change_nothing(lively, prompter, eval_path):
    one, four = (answers(lively, prompter, eval_path, batch_size=size) for size in (1, 4))
    assert [without_times(p) for p in one] == [without_times(p) for p in four]


def test_records_that_cannot_be_prepared_are_counted_failures_with_their_reason(lively, prompter, eval_path):
    found = answers(lively, prompter, eval_path, batch_size=8)
    assert len(found) == NUM_GOOD + 2
    missing, other_size = found[NUM_GOOD:]
    assert "gone.png" in missing.error
    assert other_size.error == "metadata.image_size is 7x7, the image 128x96"
    assert not missing.hit
    assert missing.text == ""
    _, refused = read_tasks([SourceSettings(str(eval_path))])
    assert refused == {f"eval:{NUM_GOOD + 2}": "no metadata.bbox: nothing to compare an answer with"}


def test_a_generation_that_fails_takes_no_other_with_it_and_reuses_no_answer(lively, prompter, eval_path, monkeypatch):
    expected = answers(lively, prompter, eval_path, batch_size=4)

    def failing(model, inputs, **arguments):
        if any("item 2" in text for text in inputs.texts):
            raise torch.OutOfMemoryError("device full")
        return generate(model, inputs, **arguments)

    monkeypatch.setattr(answering, "generate", failing)
    found = answers(lively, prompter, eval_path, batch_size=4)
    assert found[2].error == "OutOfMemoryError: device full"
    assert found[2].text == ""
    assert not found[2].hit
    assert found[2].full_blocks == expected[2].full_blocks
    for number in {*range(NUM_GOOD)} - {2}:
        assert without_times(found[number]) == without_times(expected[number])


def run(*arguments: str, ranks: int = 1) -> subprocess.CompletedProcess:
    start = [sys.executable, "-m"]
    if ranks > 1:
        start += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
    command = [*start, "training.evaluate", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.ranks
def test_two_ranks_give_the_result_of_one_and_a_stopped_pass_goes_on(lively_folder, eval_path, tmp_path):
    command = [str(lively_folder), "--data", str(eval_path), "--batch-size", "2", *SMALL]
    alone = evaluate.main([*command, "--out", str(tmp_path / "one")])
    assert alone == 0
    done = run(*command, "--out", str(tmp_path / "two"), ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    for mode, strategy in (("full", "none"), ("pruned", "pred2d")):
        one, two = (json.loads((tmp_path / name / mode / "result.json").read_text()) for name in ("one", "two"))
        assert one["prune"]["strategy"] == strategy
        assert one["num_refused"] == 1
        assert one["overall"]["all"]["num"] == NUM_GOOD + 2
        assert one["overall"]["all"]["num_failed"] == 2
        for result in (one, two):
            for group in ("overall", "subset", "element"):
                for score in result[group].values():
                    score.pop("first_token_s")
        assert one == two
        assert (tmp_path / "one" / mode / "sheet.png").exists()
    full, pruned = (json.loads((tmp_path / "one" / m / "result.json").read_text()) for m in ("full", "pruned"))
    assert full["overall"]["all"]["retain_ratio"] == 1
    assert pruned["overall"]["all"]["retain_ratio"] < 1

    # A kill left rank 1 with half a line and rank 0 with its first record alone: one rank finishes both.
    folder = tmp_path / "two" / "pruned"
    expected = (folder / "predictions.jsonl").read_text()
    first, second = (folder / f"rank000{rank}.jsonl" for rank in (0, 1))
    kept = first.read_text().splitlines()[0]
    first.write_text(kept.replace('"text": "', '"text": "kept: ') + "\n")
    second.write_text(second.read_text()[:50])
    (folder / "predictions.jsonl").unlink()
    assert evaluate.main([*command, "--out", str(tmp_path / "two"), "--mode", "pruned"]) == 0
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert rows[0]["text"].startswith("kept: "), "what is done is not done again"
    again = [{k: v for k, v in row.items() if k != "first_token_s"} for row in rows[1:]]
    assert again == [
        {k: v for k, v in json.loads(line).items() if k != "first_token_s"} for line in expected.splitlines()[1:]
    ]


def test_other_settings_do_not_continue_a_pass(toy_folder, eval_path, tmp_path, capsys):
    command = [str(toy_folder), "--data", str(eval_path), "--mode", "pruned", "--limit", "2", "--out", str(tmp_path)]
    assert evaluate.main([*command, *SMALL]) == 0
    assert evaluate.main([*command, *SMALL, "--strategy", "random"]) == 2
    assert "holds predictions made with another prune" in " ".join(capsys.readouterr().err.split())


def test_failed_records_are_answered_again_when_asked(tmp_path):
    files = PredictionFiles(tmp_path, {"checkpoint": "a"})
    files.start()
    facts = {"hit": True, "point": (1.0, 2.0), "problem": "", "box": (0, 0, 3, 3), "image_size": (9, 9)}
    good = Prediction(id="a", text="(1, 2)", error="", subset="", element="", **facts)
    bad = Prediction(id="b", text="", error="OutOfMemoryError", subset="", element="", **facts)
    files.append(3, [good, bad])
    files.start()
    assert files.done() == {"a": good, "b": bad}
    files.start(retry_failed=True)
    assert files.done() == {"a": good}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no/such/folder/here"], "not a loadable model folder"),
        (["TOY", "--strategy", "sideways", "--mode", "pruned"], "prune.strategy: expected one of"),
    ],
)
def test_mistakes_end_with_one_line(arguments, message, toy_folder, eval_path, tmp_path, capsys):
    arguments = [str(toy_folder) if argument == "TOY" else argument for argument in arguments]
    assert evaluate.main([*arguments, "--data", str(eval_path), "--out", str(tmp_path), *SMALL]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
