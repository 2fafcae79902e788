"""lmms-eval's own docvqa and chartqa tasks, on local data of their shape, through the plugin.

It has an environment of its own: `make lmms-env test-lmms`.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import subprocess
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

pytestmark = [
    pytest.mark.lmms,
    pytest.mark.skipif(
        importlib.util.find_spec("lmms_eval") is None, reason="lmms-eval is not installed (make lmms-env)"
    ),
]

ROOT = Path(__file__).parents[2]
NUM = 7


def part_of_training() -> None:
    """Lets modules of `training` be imported that need nothing of its stack, which this environment does not have."""
    if "training" not in sys.modules:
        package = types.ModuleType("training")
        package.__path__ = [str(ROOT / "training")]
        sys.modules["training"] = package


def screen(seed: int, rows: int = 4, cols: int = 5) -> bytes:
    """A picture of 32 x 32 blocks, most of them of one colour."""
    rng = np.random.default_rng(seed)
    pixels = np.full((rows * 32, cols * 32, 3), 200, dtype=np.uint8)
    for _ in range(5):
        row, col = rng.integers(rows), rng.integers(cols)
        pixels[row * 32 : row * 32 + 32, col * 32 : col * 32 + 32] = rng.integers(0, 255, (32, 32, 3))
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A toy checkpoint whose answers vary."""
    import torch
    from transformers import AutoModelForImageTextToText

    part_of_training()
    from training.composition.toy import build_toy_model

    folder = tmp_path_factory.mktemp("toy") / "model"
    build_toy_model(folder)
    toy = AutoModelForImageTextToText.from_pretrained(folder)
    with torch.no_grad():
        for name, parameter in toy.named_parameters():
            if parameter.ndim > 1 and "embed_tokens" not in name:
                parameter.mul_(3)
    toy.save_pretrained(folder)
    return folder


def write_tasks(folder: Path, references: dict[str, list[str]]) -> None:
    """Tasks docs and charts: the stock ones on local files. references: right answers of each, one per document."""
    import datasets
    import lmms_eval

    stock = Path(lmms_eval.__file__).parent / "tasks"
    images = [{"bytes": screen(number), "path": None} for number in range(NUM)]
    questions = [f"What is item {number}?" for number in range(NUM)]
    docs = {
        "questionId": [str(number) for number in range(NUM)],
        "question": questions,
        "image": images,
        "answers": [[reference] for reference in references["docs"]],
    }
    charts = {
        "type": ["human_test" if number % 2 else "augmented_test" for number in range(NUM)],
        "question": questions,
        "image": images,
        "answer": references["charts"],
    }
    for name, columns, split, path in (
        ("docs", docs, "validation", stock / "docvqa" / "docvqa_val.yaml"),
        ("charts", charts, "test", stock / "chartqa" / "chartqa.yaml"),
    ):
        (folder / name).mkdir(parents=True, exist_ok=True)
        data = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
        data.to_parquet(str(folder / name / f"{split}.parquet"))
        lines = [f"include: {path}", f"task: {name}", f"dataset_path: {folder / name}", "dataset_name: null"]
        (folder / f"{name}.yaml").write_text("\n".join([*lines, "dataset_kwargs: {}"]) + "\n")


def run(model: Path, tasks: Path, out: Path, *, batch: int, ranks: int = 1, more: str = "") -> dict[str, dict]:
    """Scores of both tasks as lmms-eval reports them."""
    start = [sys.executable, "-m"]
    if ranks > 1:
        start += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
    arguments = f"pretrained={model},answers={out / 'answers'},min_pixels=1024{more}"
    command = [*start, "lmms_eval", "--model", "pixelprune", "--model_args", arguments, "--tasks", "docs,charts"]
    command += ["--include_path", str(tasks), "--batch_size", str(batch), "--output_path", str(out / "results")]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(out / "cache"), "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=550, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    reports = sorted((out / "results").rglob("*_results.json"), key=lambda path: path.stat().st_mtime)
    assert reports, done.stdout[-3000:] + done.stderr[-6000:]
    return json.loads(reports[-1].read_text())["results"]


def answers(out: Path) -> dict[tuple[str, str], dict]:
    lines = [line for path in (out / "answers").glob("rank*.jsonl") for line in path.read_text().splitlines()]
    return {(row["task"], row["doc_id"]): row for row in map(json.loads, lines)}


@pytest.fixture(scope="module")
def asked(model, tmp_path_factory) -> tuple[Path, Path]:
    """(tasks, out) of a pass with batches of one; the references are then made from its answers."""
    folder = tmp_path_factory.mktemp("lmms")
    write_tasks(folder / "tasks", {"docs": ["nothing"] * NUM, "charts": ["nothing"] * NUM})
    run(model, folder / "tasks", folder / "out", batch=1)
    given = answers(folder / "out")
    references = {
        name: [changed(given[name, str(number)]["text"], number) for number in range(NUM)]
        for name in ("docs", "charts")
    }
    write_tasks(folder / "tasks", references)
    return folder / "tasks", folder / "out"


def changed(text: str, number: int) -> str:
    """The answer itself, a part of it, or another text."""
    return (text, text[: max(1, 3 * len(text) // 4)] or "x", "something else")[number % 3] or "x"


def ours(out: Path, tasks: Path) -> tuple[float, float]:
    """Mean ANLS of docs and mean relaxed accuracy of charts over the logged answers, by this project's scorers."""
    import pyarrow.parquet as pq

    part_of_training()
    from training.evaluation.scorers import score_answer
    from training.evaluation.targets import Target

    given = answers(out)
    means = []
    for name, scorer, split, column in (
        ("docs", "anls", "validation", "answers"),
        ("charts", "relaxed", "test", "answer"),
    ):
        references = pq.read_table(tasks / name / f"{split}.parquet").column(column).to_pylist()
        scores = []
        for number, reference in enumerate(references):
            target = Target(scorer, tuple(reference) if isinstance(reference, list) else (reference,))
            scores.append(score_answer(given[name, str(number)]["text"], target, None, "auto").score)
        means.append(sum(scores) / len(scores))
    return means[0], means[1]


def test_scores_are_ours_on_the_same_answers_and_nothing_is_asked_twice(model, asked):
    tasks, out = asked
    before = {path: path.read_bytes() for path in (out / "answers").glob("rank*.jsonl")}
    results = run(model, tasks, out, batch=1)
    assert {path: path.read_bytes() for path in before} == before, "the same prompts: every answer is in the log"
    anls, relaxed = ours(out, tasks)
    assert 0 < anls < 1
    assert 0 < relaxed < 1
    assert results["docs"]["anls,none"] == pytest.approx(anls)
    assert results["charts"]["relaxed_overall,none"] == pytest.approx(relaxed)
    rows = answers(out).values()
    assert all(0 < row["kept_blocks"] < row["full_blocks"] == 20 for row in rows)


@pytest.mark.parametrize(("batch", "ranks"), [(3, 1), (1, 2)])
def test_batches_and_ranks_change_nothing(model, asked, tmp_path, batch, ranks):
    tasks, out = asked
    results = run(model, tasks, tmp_path, batch=batch, ranks=ranks)
    one, other = answers(out), answers(tmp_path)
    assert {key: row["text"] for key, row in other.items()} == {key: row["text"] for key, row in one.items()}
    assert len(list((tmp_path / "answers").glob("rank*.jsonl"))) == ranks
    anls, relaxed = ours(out, tasks)
    assert results["docs"]["anls,none"] == pytest.approx(anls)
    assert results["charts"]["relaxed_overall,none"] == pytest.approx(relaxed)


def test_full_is_asked_with_all_blocks(model, asked, tmp_path):
    tasks, out = asked
    run(model, tasks, tmp_path, batch=3, more=",strategy=none")
    assert all(row["kept_blocks"] == row["full_blocks"] == 20 for row in answers(tmp_path).values())
    assert answers(tmp_path) != answers(out)


def request(task: str = "docs", **generation) -> SimpleNamespace:
    return SimpleNamespace(args=("", lambda doc: doc, {"max_new_tokens": 3, **generation}, 0, task, "test"))


def test_what_would_be_scored_or_answered_otherwise_is_refused(model, tmp_path):
    from pixelprune.lmms.model import PixelPruneModel, max_new_tokens_of, messages_of

    asked = PixelPruneModel(str(model), answers=str(tmp_path), min_pixels=1024, device="cpu")
    with pytest.raises(ValueError, match="right ones count as wrong"):
        asked.generate_until([request("screenspot_v2")])
    for wrong in ({"temperature": 0.7}, {"do_sample": True}, {"num_beams": 4}, {"presence_penalty": 1.5}):
        with pytest.raises(ValueError, match="pixelprune answers greedily"):
            asked.generate_until([request(**wrong)])
    asked._world_size = 2  # as lmms-eval sets it
    with pytest.raises(ValueError, match="accelerate knows of 1"):
        asked.generate_until([request()])
    assert max_new_tokens_of({"until": ["\n"], "temperature": 0, "do_sample": False, "max_new_tokens": 32}) == 32
    with pytest.raises(ValueError, match="a message holds video"):
        messages_of([{"role": "user", "content": [{"type": "video", "url": "x.mp4"}]}])
    with pytest.raises(NotImplementedError, match="loglikelihood"):
        asked.loglikelihood([])


def test_an_answer_cut_short_by_a_kill_is_made_again(tmp_path):
    from pixelprune.lmms.answer_log import AnswerLog, LoggedAnswer

    first = LoggedAnswer("a", "docs", "0", "text\n\u2028é", 1, 2, 3)
    AnswerLog(tmp_path, 0, "").add([first])
    with (tmp_path / "rank0000.jsonl").open("a") as file:
        file.write('{"key": "b", "ta')
    log = AnswerLog(tmp_path, 0, "")
    assert log.get("a") == first
    assert log.get("b") is None
    log.add([LoggedAnswer("c", "docs", "2", "", 0, 0, 0)])
    rows = [json.loads(line) for line in (tmp_path / "rank0000.jsonl").read_text().splitlines()]
    assert [row["key"] for row in rows] == ["a", "c"]
