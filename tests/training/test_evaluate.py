"""Evaluation passes: answers are those of `generate`, batches and ranks change nothing, failures stay failures."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

from pixelprune import hf
from pixelprune.hf import generate, prepare
from pixelprune.prompter import Prompter
from pixelprune.records.chat import ChatEncoder
from pixelprune.sessions import select_session
from pixelprune.settings import PruneSettings, ResizeSettings
from tests.conftest import screen
from tests.kernels import needs_plain_layers
from tests.ranks import ROOT
from tests.samples import write_jsonl
from tests.training.test_qwen3_5 import REASONING_TEMPLATE
from training import evaluate
from training.composition.toy import CHAT_TEMPLATE, build_toy_model
from training.data.settings import SourceSettings
from training.errors import UserError
from training.evaluation import answering
from training.evaluation.answering import AnswerSettings, predict, prepare_task, read_tasks
from training.evaluation.inputs import default_out, name_sources
from training.evaluation.passes import result_table
from training.evaluation.prediction_files import PredictionFiles
from training.evaluation.prediction_sheet import draw_sheet
from training.evaluation.scoring import Prediction

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


def test_many_questions_about_one_screenshot_are_answered_as_alone(lively, prompter, tmp_path, monkeypatch):
    pixels = screen(8, 10, seed=1)
    Image.fromarray(pixels).save(tmp_path / "one.png")
    rows = []
    for question in ("Where is Save?", "And what is below the title?", "Open", "Close", "Find the menu, please."):
        content = [{"type": "image", "image": "one.png"}, {"type": "text", "text": question}]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "(1, 1)"}]
        rows.append({"messages": messages, "metadata": {"bbox": [0, 0, *pixels.shape[1::-1]]}})
    path, prefilled = write_jsonl(tmp_path / "eval.jsonl", rows), []
    shared_cache = hf.shared_cache
    monkeypatch.setattr(hf, "shared_cache", lambda *args: prefilled.append(shared_cache(*args)) or prefilled[-1])
    one = answers(lively, prompter, path, batch_size=1)
    assert not any(prefilled)
    five = answers(lively, prompter, path, batch_size=5)
    assert prefilled[-1] is not None, "the five prompts share what is prefilled"
    assert [without_times(p) for p in five] == [without_times(p) for p in one]


def test_records_that_cannot_be_prepared_are_counted_failures_with_their_reason(lively, prompter, eval_path):
    found = answers(lively, prompter, eval_path, batch_size=8)
    assert len(found) == NUM_GOOD + 2
    missing, other_size = found[NUM_GOOD:]
    assert "gone.png" in missing.error
    assert other_size.error == "metadata.image_size is 7x7, the image 128x96"
    assert not missing.hit
    assert missing.text == ""
    _, refused = read_tasks([SourceSettings(str(eval_path))])
    assert refused == {
        f"eval:{NUM_GOOD + 2}": "no metadata.bbox, polygon, refusal or scorer: nothing to compare an answer with"
    }


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
    assert "Content-Security-Policy" in (tmp_path / "one" / "results.html").read_text()
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
    facts = {
        "score": 1.0,
        "scorer": "place",
        "references": (),
        "polygon": (),
        "benchmark": "",
        "point": (1.0, 2.0),
        "problem": "",
        "box": (0, 0, 3, 3),
        "image_size": (9, 9),
        "fingerprint": "1",
    }
    good = Prediction(id="a", text="(1, 2)", error="", subset="", element="", **facts)
    bad = Prediction(id="b", text="", error="OutOfMemoryError", subset="", element="", **facts)
    files.append(3, [good, bad])
    files.start()
    now = {"a": "1", "b": "1"}
    assert files.done(now) == {"a": good, "b": bad}
    assert files.done({"a": "2", "b": "1"}) == {"b": bad}, "a is another record now"
    files.start(retry_failed=True)
    assert files.done(now) == {"a": good}


def texts_of(folder: Path) -> list[str]:
    return [json.loads(line)["text"] for line in (folder / "predictions.jsonl").read_text().splitlines()]


@pytest.fixture
def own(lively_folder, eval_path, tmp_path) -> tuple[list[str], Path, Path]:
    """A command whose model and data may be changed, its results not yet there."""
    shutil.copytree(lively_folder, tmp_path / "model")
    shutil.copytree(eval_path.parent, tmp_path / "data")
    command = [str(tmp_path / "model"), "--data", str(tmp_path / "data" / "eval.jsonl"), "--mode", "pruned", *SMALL]
    return [*command, "--limit", "3"], tmp_path / "model", tmp_path / "data"


def test_results_are_beside_the_model_folder(own):
    command, model, _ = own
    before = sorted(path.name for path in model.iterdir())
    assert evaluate.main(command) == 0
    assert sorted(path.name for path in model.iterdir()) == before
    assert (model.parent / "model-evaluation" / "pruned" / "result.json").exists()
    assert default_out("Qwen/Qwen3-VL-2B-Instruct") == Path("evaluation/Qwen--Qwen3-VL-2B-Instruct")


def test_answers_of_other_weights_are_not_continued(own, toy_model, capsys):
    command, model, _ = own
    assert evaluate.main(command) == 0
    toy_model.save_pretrained(model)  # the same names and sizes
    assert evaluate.main(command) == 2
    assert "holds predictions made with another weights" in " ".join(capsys.readouterr().err.split())


def test_records_that_changed_are_answered_again_and_the_others_are_not(own):
    command, model, data = own
    assert evaluate.main(command) == 0
    folder = model.parent / "model-evaluation" / "pruned"
    stored = folder / "rank0000.jsonl"
    stored.write_text(stored.read_text().replace('"text": "', '"text": "kept: '))
    lines = (data / "eval.jsonl").read_text().splitlines()
    lines[0] = lines[0].replace("Where is item 0, please?", "Open the menu.")
    (data / "eval.jsonl").write_text("\n".join(lines) + "\n")
    Image.fromarray(255 - screen(4, 5, seed=1)).save(data / "1.png")
    assert evaluate.main(command) == 0
    assert [text.startswith("kept: ") for text in texts_of(folder)] == [False, False, True]


def test_data_of_one_stem_is_told_apart_by_its_folder(own):
    command, model, data = own
    shutil.copytree(data, data.parent / "other")
    more = [str(data.parent / "other" / "eval.jsonl"), "--limit", "0"]
    at = command.index("--data") + 2
    assert evaluate.main([*command[:at], *more, *command[at:-2]]) == 0
    rows = (model.parent / "model-evaluation" / "pruned" / "predictions.jsonl").read_text().splitlines()
    ids = {json.loads(row)["id"] for row in rows}
    assert ids == {f"{name}/eval:{row}" for name in ("data", "other") for row in range(NUM_GOOD + 2)}
    assert [source.name for source in name_sources(["a/eval.jsonl", "b.jsonl"])] == ["eval", "b"]
    with pytest.raises(UserError, match=r"--data: a\.jsonl is given twice"):
        name_sources(["a.jsonl", "a.jsonl"])


def test_reasoning_templates_are_asked_as_they_are_trained(toy_folder, eval_path):
    """The prompt is what stands in front of the answer in training: an empty reasoning block, although this template
    reasons unless it is told not to."""
    macro = CHAT_TEMPLATE[: CHAT_TEMPLATE.index("{%- for message")]
    template = REASONING_TEMPLATE.replace("message.content +", "render(message.content) +")
    template = macro + template.replace("if enable_thinking", "if enable_thinking | default(true)")
    task = read_tasks([SourceSettings(str(eval_path))])[0][0]
    tokenizer = AutoTokenizer.from_pretrained(toy_folder)
    tokenizer.chat_template = template
    prompter = dataclasses.replace(Prompter.load(str(toy_folder)), tokenizer=tokenizer, chat_template=template)

    def prompt(settings: AnswerSettings) -> str:
        return prepare_task(task, prompter, settings.template_kwargs).texts[0]

    trained, _ = ChatEncoder(tokenizer).render(task.record)
    assert trained.startswith(prompt(AnswerSettings()) + "(1, 1)")
    assert prompt(AnswerSettings(template_kwargs={"enable_thinking": True})).endswith("<think>\n")


def test_template_kwargs_are_given_as_json_and_recorded(own, capsys):
    command, model, _ = own
    assert evaluate.main(command) == 0
    result = json.loads((model.parent / "model-evaluation" / "pruned" / "result.json").read_text())
    assert result["template_kwargs"] == {"enable_thinking": False}
    assert evaluate.main([*command, "--template-kwargs", '{"enable_thinking": true}']) == 2
    assert "made with another template_kwargs" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(SystemExit):
        evaluate.main([*command, "--template-kwargs", "[1]"])


def test_a_picture_that_cannot_be_drawn_leaves_the_results(own, caplog):
    """Gone between two starts, or larger than the limit that others than this model's settings have."""
    command, model, data = own
    assert evaluate.main(command) == 0
    tasks, _ = read_tasks([SourceSettings(str(data / "eval.jsonl"))])
    rows = (model.parent / "model-evaluation" / "pruned" / "predictions.jsonl").read_text().splitlines()
    pairs = list(zip(tasks, [Prediction.from_dict(json.loads(row)) for row in rows], strict=False))
    (data / "0.png").write_bytes(b"\x89PNG, and then nothing")
    assert draw_sheet(pairs, model / "sheet.png", ResizeSettings())
    assert "eval:0 is left out" in caplog.text
    assert draw_sheet(pairs, model / "none.png", ResizeSettings(max_decoded_pixels=100)) is None


def test_a_hybrid_model_is_evaluated(eval_path, tmp_path):
    needs_plain_layers("qwen3_5")
    model = build_toy_model(tmp_path / "hybrid", family="qwen3_5")
    command = [str(model), "--data", str(eval_path), "--mode", "pruned", "--limit", "4", "--batch-size", "3", *SMALL]
    assert evaluate.main(command) == 0
    result = json.loads((tmp_path / "hybrid-evaluation" / "pruned" / "result.json").read_text())
    overall = result["overall"]["all"]
    assert (overall["num"], overall["num_failed"]) == (4, 0)
    assert overall["retain_ratio"] < 1


@pytest.mark.ranks
def test_an_error_of_one_rank_is_said_and_ends_all(toy_folder, eval_path, tmp_path):
    for same, said in ((False, "error: rank 1: source no/such.jsonl"), (True, "error: source no/such.jsonl")):
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
        command = [*start, "tests.training.evaluate_program", "same" if same else "other", str(toy_folder)]
        command += ["--data", str(eval_path), "--out", str(tmp_path), *SMALL]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode != 0
        assert said in done.stderr
        assert done.stderr.count("source no/such.jsonl: there is no ") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no/such/folder/here"], "not a loadable model folder"),
        (["TOY", "--strategy", "sideways", "--mode", "pruned"], "prune.strategy: expected one of"),
        (["TOY", "--direction", "forward", "--mode", "pruned"], "--direction: belongs to --strategy pred3d"),
        (["TOY", "--strategy", "pred3d", "--keep-replaced", "--mode", "pruned"], "belongs to pred3d with --direction"),
        (["TOY", "--budget", "pred3d", "--mode", "pruned"], "--budget: belongs to --strategy conncomp"),
    ],
)
def test_mistakes_end_with_one_line(arguments, message, toy_folder, eval_path, tmp_path, capsys):
    arguments = [str(toy_folder) if argument == "TOY" else argument for argument in arguments]
    assert evaluate.main([*arguments, "--data", str(eval_path), "--out", str(tmp_path), *SMALL]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("flags", "direction", "keep_replaced"),
    [
        (["--strategy", "pred3d"], "backward", False),
        (["--strategy", "pred3d", "--direction", "forward", "--no-keep-replaced"], "forward", False),
        (["--strategy", "random", "--budget", "pred3d", "--seed", "1", "--direction", "forward"], "forward", True),
    ],
)
def test_sessions_are_evaluated_as_the_command_line_says(flags, direction, keep_replaced, toy_folder, tmp_path):
    """What is kept of two screenshots is what `select_session` keeps of them, whatever the model's own settings are."""
    first = np.random.default_rng(1).integers(0, 255, (96, 128, 3), dtype=np.uint8)
    first[:, 96:] = 9
    second = first.copy()
    second[32:64, 64:96] = 9  # it vanished into the ground
    for number, pixels in enumerate((first, second)):
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    content = [{"type": "image", "image": f"{number}.png"} for number in (0, 1)]
    turns = [{"role": "user", "content": [*content, {"type": "text", "text": "Which?"}]}]
    turns.append({"role": "assistant", "content": "b"})
    row = {"messages": turns, "metadata": {"scorer": "exact", "answers": ["b"]}}
    path = write_jsonl(tmp_path / "two.jsonl", [row])
    arguments = [str(toy_folder), "--data", str(path), "--out", str(tmp_path / "out"), "--mode", "pruned", *SMALL]
    assert evaluate.main([*arguments, "--page", "0", *flags]) == 0
    result = json.loads((tmp_path / "out" / "pruned" / "result.json").read_text())
    kept = select_session([first, second], direction=direction, keep_replaced=keep_replaced)
    ratio = sum(one.num_kept for one in kept) / sum(one.num_blocks for one in kept)
    assert result["overall"]["all"]["retain_ratio"] == pytest.approx(ratio, abs=1e-12)


def test_half_a_character_fails_its_record_alone(toy_folder, tmp_path):
    """JSON may hold the half of a surrogate pair, which no tokenizer takes."""
    turns = [{"role": "user", "content": "a\ud800"}, {"role": "assistant", "content": "b"}]
    row = {"messages": turns, "metadata": {"scorer": "exact", "answers": ["b"]}}
    path = write_jsonl(tmp_path / "halves.jsonl", [row])
    tasks, refused = read_tasks([SourceSettings(str(path))])
    assert refused == {}
    (made,) = predict(None, Prompter.load(str(toy_folder)), tasks, AnswerSettings())
    assert "not valid Unicode" in made[0].error


def test_a_benchmark_without_subsets_is_one_line_of_the_table():
    score = {"num": 4, "accuracy": 0.5, "num_unparsed": 0, "num_failed": 0, "retain_ratio": 0.3}
    score |= {"tokens_per_answer": 9.0, "first_token_s": 0.1}
    groups = {"overall": {"all": score}, "benchmark": {"a": score}, "element": {"icon": score}}
    result = {"prune": {"strategy": "none"}, "num_refused": 0, **groups}
    for subset, lines in ((["a"], ["all", "a", "icon"]), (["x", "y"], ["all", "a", "x", "y", "icon"])):
        table = result_table("full", result | {"subset": dict.fromkeys(subset, score)})
        assert list(table.columns[0].cells) == lines
