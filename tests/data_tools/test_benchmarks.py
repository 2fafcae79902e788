"""Benchmarks in their published shapes: what evaluation reads of the records is what the files say."""

from __future__ import annotations

import base64
import csv
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_tools.cli import main
from pixelprune.records.reader import parse_record
from training.evaluation.scoring import judge, summarise
from training.evaluation.targets import target_of


def test_chartqa(tmp_path: Path, capsys):
    (tmp_path / "png").mkdir()
    Image.new("RGB", (64, 32), "white").save(tmp_path / "png" / "41699.png")
    human = [
        {"imgname": "41699.png", "query": "How many bars?", "label": "14"},
        {"imgname": "gone.png", "query": "How many bars?", "label": "14"},
        {"imgname": "41699.png", "query": "Which?", "label": 3},
    ]
    augmented = [{"imgname": "41699.png", "query": "Is it <image>?", "label": "No"}]
    (tmp_path / "test_human.json").write_text(json.dumps(human))
    (tmp_path / "test_augmented.json").write_text(json.dumps(augmented))
    out = tmp_path / "chartqa.jsonl"
    command = ["chartqa", str(tmp_path), "--images", str(tmp_path / "png"), "--out", str(out), "--sheet", "0"]
    assert main(command) == 0
    rows = {row["id"]: row for row in map(json.loads, out.read_text().splitlines())}
    assert list(rows) == ["test_augmented-00000", "test_human-00000"]
    report = json.loads(out.with_suffix(".report.json").read_text())
    assert report["dropped"]["entries"] == {"image missing": 1, "label is no text": 1}
    assert report["subsets"] == {"human": 1, "augmented": 1}
    records = {name: parse_record(row) for name, row in rows.items()}
    assert records["test_augmented-00000"].messages[0].text == "Is it <image>?", "typed texts mean what they say"
    answers = {"test_human-00000": "14.5", "test_augmented-00000": "Yes"}
    found = [judge(name, target_of(record), answers[name], (64, 32), "auto") for name, record in records.items()]
    result = summarise(found)
    assert {name: score["accuracy"] for name, score in result["subset"].items()} == {"human": 1, "augmented": 0}
    assert result["benchmark"]["chartqa"]["macro"] == 0.5
    (tmp_path / "test.json").write_text(json.dumps(human))
    other = [
        "chartqa",
        str(tmp_path / "test.json"),
        "--images",
        str(tmp_path / "png"),
        "--out",
        str(out),
        "--overwrite",
    ]
    assert main(other) == 2
    assert "named for one of human, augmented" in " ".join(capsys.readouterr().err.split())


def convert(folder: Path, command: str, *files: str, images: str | None = "images", **options: str) -> list[dict]:
    """The records that a command makes of files in `folder`, and its report beside them."""
    words = [command, *(str(folder / name) for name in files), "--out", str(folder / "out.jsonl"), "--sheet", "0"]
    words += ["--images", str(folder / images)] if images else []
    words += [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
    assert main([*words, "--overwrite"]) == 0
    return [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]


def dropped(folder: Path) -> dict[str, int]:
    return json.loads((folder / "out.report.json").read_text())["dropped"]["entries"]


def picture(path: Path, size: tuple[int, int] = (200, 100)) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "white").save(path)
    return path.read_bytes()


def scored(rows: list[dict], answers: dict[str, str], size: tuple[int, int] = (200, 100)) -> dict:
    """What evaluation makes of answers to the records that were written."""
    records = {row["id"]: parse_record(row) for row in rows}
    assert records.keys() == answers.keys()
    return summarise([judge(key, target_of(records[key]), answers[key], size, "auto") for key in answers])


def test_docvqa(tmp_path: Path, capsys):
    picture(tmp_path / "images/documents/a_1.png")
    data = [
        {
            "questionId": 49,
            "question": "Who?",
            "image": "documents/a_1.png",
            "answers": ["Ann Lee", "A. Lee"],
            "docId": 1,
        },
        {"questionId": 50, "question": "When?", "image": "documents/a_1.png", "answers": ["1975"]},
        {"questionId": 51, "question": "Of a test split", "image": "documents/a_1.png"},
    ]
    (tmp_path / "val.json").write_text(json.dumps({"dataset_name": "docvqa", "data": data}, indent=4))
    rows = convert(tmp_path, "docvqa", "val.json")
    assert dropped(tmp_path) == {"answers: no texts": 1}
    result = scored(rows, {"49": "ann  lea", "50": "75"})
    # "ann lea": 1 - 1 / 8, as spaces count in the length; "75": 1 - 2 / 4 is not below the threshold of 0.5.
    assert result["benchmark"]["docvqa"]["accuracy"] == (0.875 + 0.5) / 2
    (tmp_path / "list.json").write_text(json.dumps(data))
    words = ["docvqa", str(tmp_path / "list.json"), "--out", str(tmp_path / "out.jsonl"), "--overwrite"]
    assert main(words) == 2
    assert "whose 'data' is a list" in " ".join(capsys.readouterr().err.split())


def test_infovqa(tmp_path: Path):
    picture(tmp_path / "images/20471.jpeg")
    entry = {"questionId": 98, "question": "How many?", "image_local_name": "20471.jpeg", "answers": ["9"]}
    (tmp_path / "val.json").write_text(json.dumps({"data": [entry | {"answer_type": ["single span"]}]}))
    (row,) = convert(tmp_path, "infovqa", "val.json")
    assert row["metadata"] == {"source": "infovqa", "scorer": "anls", "answers": ["9"], "types": ["single span"]}


def test_ocrbench(tmp_path: Path):
    picture(tmp_path / "images/IIIT5K/1.png")
    shared = {"image_path": "IIIT5K/1.png", "question": "what is written in the image?"}
    data = [
        {**shared, "dataset_name": "IIIT5K", "id": 7, "answers": "CENTRE", "type": "Regular Text Recognition"},
        {**shared, "dataset_name": "SROIE", "id": 7, "answers": ["12.50"], "type": "Key Information Extraction"},
        {**shared, "dataset_name": "HME100k", "id": 9, "answers": "B a = 4\n", "type": "Handwritten Mathematical"},
    ]
    (tmp_path / "OCRBench.json").write_text(json.dumps(data))
    rows = convert(tmp_path, "ocrbench", "OCRBench.json")
    result = scored(rows, {"IIIT5K-7": "the centre", "SROIE-7": "12,50", "HME100k-9": "It is Ba=4."})
    assert result["benchmark"]["ocrbench"]["accuracy"] == 2 / 3 == result["benchmark"]["ocrbench"]["macro"]
    assert result["element"]["Key Information Extraction"]["accuracy"] == 0


def test_mmlongbench_shows_all_pages_in_order(tmp_path: Path):
    for number in range(1, 12):
        picture(tmp_path / f"pages/report-2020_{number}.png")
    picture(tmp_path / "pages/gap-1.png")
    picture(tmp_path / "pages/gap-3.png")
    shared = {"doc_type": "Guidebook", "question": "Which?", "answer": "Not answerable", "answer_format": "None"}
    data = [
        {**shared, "doc_id": "report-2020.pdf", "evidence_pages": "[5]", "evidence_sources": "['Chart']"},
        {**shared, "doc_id": "gap.pdf"},
        {**shared, "doc_id": "unknown.pdf"},
    ]
    (tmp_path / "samples.json").write_text(json.dumps(data))
    (row,) = convert(tmp_path, "mmlongbench", "samples.json", images="pages")
    assert dropped(tmp_path) == {"a page image is missing": 1, "no page images": 1}
    parts = row["messages"][0]["content"]
    assert [part["image"] for part in parts[:-1]] == [f"pages/report-2020_{number}.png" for number in range(1, 12)]
    assert scored([row], {"samples-00000": "Not answerable"})["benchmark"]["mmlongbench-doc"]["accuracy"] is None
    (row,) = convert(tmp_path, "mmlongbench", "samples.json", images="pages", max_pages="10")
    assert (row["metadata"]["num_pages_shown"], row["metadata"]["num_pages"]) == (10, 11)
    assert len(row["messages"][0]["content"]) == 11


def test_olmocrbench_there_and_back(tmp_path: Path, capsys):
    picture(tmp_path / "pages/arxiv_math/2503_pg4-1.png")
    picture(tmp_path / "pages/tables/t.pdf-1.png")
    tests = [
        {"pdf": "arxiv_math/2503_pg4.pdf", "page": 1, "id": "m1", "type": "math", "math": "x"},
        {"pdf": "arxiv_math/2503_pg4.pdf", "page": 1, "id": "m2", "type": "math", "math": "y"},
        {"pdf": "arxiv_math/2503_pg4.pdf", "page": 2, "id": "m3", "type": "math", "math": "z"},
    ]
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench/arxiv_math.jsonl").write_text("".join(json.dumps(test) + "\n" for test in tests))
    (row,) = convert(tmp_path, "olmocrbench", "bench", images="pages")
    assert row["id"] == "arxiv_math/2503_pg4_pg1_repeat1"
    assert parse_record(row).messages[-1].role == "user"
    assert target_of(parse_record(row)).source_id == row["id"], "which predictions carry"
    assert dropped(tmp_path) == {"another test on a page that is asked for already": 1, "no page images": 1}
    (tmp_path / "predictions.jsonl").write_text(
        json.dumps({"id": "out:0", "source_id": row["id"], "text": "# é"}) + "\n"
    )
    words = ["olmocrbench-answers", str(tmp_path / "predictions.jsonl"), "--out", str(tmp_path / "bench/ours")]
    assert main(words) == 0
    assert (tmp_path / "bench/ours/arxiv_math/2503_pg4_pg1_repeat1.md").read_text(encoding="utf-8") == "# é"
    assert main(words) == 2
    (tmp_path / "predictions.jsonl").write_text(json.dumps({"source_id": "../../x_repeat1", "text": ""}) + "\n")
    assert main([*words[:-1], str(tmp_path / "bench/other")]) == 2
    assert "expected the answers to olmocrbench records" in " ".join(capsys.readouterr().err.split())


def tsv(path: Path, rows: list[dict]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)


def test_mmbench_counts_a_circle_once_and_reads_pictures_of_other_rows(tmp_path: Path):
    data = base64.b64encode(picture(tmp_path / "a.png")).decode()
    one = {"question": "What\nis it?", "A": "cat", "B": "None", "category": "object", "split": "dev", "image": data}
    rows = [
        {"index": "1000005", **one, "A": "None", "B": "cat", "answer": "B", "image": "5"},
        {"index": "5", **one, "answer": "A", "hint": "It purrs."},
        {"index": "6", **one, "answer": "A"},
        {"index": "7", **one, "answer": ""},
        {"index": "8", **one, "answer": "C"},
        {"index": "9", **one, "answer": "A", "image": "77"},
        {"index": "10", **one, "answer": "A", "C": "", "D": "gap"},
        {"index": "../x", **one, "answer": "A"},
    ]
    tsv(tmp_path / "MMBench_DEV_EN.tsv", rows)
    made = convert(tmp_path, "mcq", "MMBench_DEV_EN.tsv", images=None)
    assert dropped(tmp_path) == {
        "answer is no text": 1,
        "answer is no letter of its options": 1,
        "image of another row missing": 1,
        "options are not A, B, ... without a gap": 1,
        "image is no picture": 1,
    }
    assert [row["id"] for row in made] == ["1000005", "5", "6"], "published ids"
    texts = [row["messages"][0]["content"][-1]["text"] for row in made]
    assert texts[1] == "Hint: It purrs.\nWhat\nis it?\nOptions:\nA. cat\nB. None"
    assert {row["messages"][0]["content"][0]["image"] for row in made[:2]} == {"images/MMBench_DEV_EN/5-0.png"}
    assert (tmp_path / "images/MMBench_DEV_EN/5-0.png").read_bytes() == (tmp_path / "a.png").read_bytes()
    result = scored(made, {"1000005": "A", "5": "A", "6": "A. cat"})
    # Two questions: 5, asked twice and wrong once, and 6.
    assert result["benchmark"]["mmbench_dev_en-dev"]["accuracy"] == 0.5
    assert result["element"]["object"]["accuracy"] == 0.5


def test_mmmu_has_several_pictures_and_splits_and_open_questions(tmp_path: Path):
    images = [base64.b64encode(picture(tmp_path / f"{n}.png", (n, n))).decode() for n in (40, 50)]
    rows = [
        {"index": "1", "question": "<image 1> or <image 2>?", "A": "x", "B": "y", "answer": "B", "split": "validation"},
        {"index": "2", "question": "<image 1>?", "A": "", "B": "", "answer": "42", "split": "dev"},
    ]
    tsv(tmp_path / "MMMU_DEV_VAL.tsv", [rows[0] | {"image": str(images)}, rows[1] | {"image": images[0]}])
    made = convert(tmp_path, "mcq", "MMMU_DEV_VAL.tsv", images=None)
    assert [part.get("image") for part in made[0]["messages"][0]["content"]] == [
        "images/MMMU_DEV_VAL/1-0.png",
        "images/MMMU_DEV_VAL/1-1.png",
        None,
    ]
    assert parse_record(made[0]).messages[0].text == "<image 1> or <image 2>?\nOptions:\nA. x\nB. y"
    result = scored(made, {"1": "(B) y", "2": "42."})
    assert {name: score["accuracy"] for name, score in result["benchmark"].items()} == {
        "mmmu_dev_val-dev": 1,
        "mmmu_dev_val-validation": 1,
    }


@pytest.mark.parametrize("name", ["MMStar", "RealWorldQA", "HRBench4K", "VStarBench", "AI2D_TEST"])
def test_files_of_the_same_shape(tmp_path: Path, name: str):
    data = base64.b64encode(picture(tmp_path / "a.png")).decode()
    options = {"A": "red", "B": "blue", "C": "green", "D": "black"}
    row = {"index": "0", "question": "Colour?", **options, "answer": "C", "category": "single", "image": data}
    tsv(tmp_path / f"{name}.tsv", [row, row | {"index": "1", "answer": "A"}])
    made = convert(tmp_path, "mcq", f"{name}.tsv", images=None)
    result = scored(made, {"0": "green", "1": "D"})
    assert result["benchmark"][name.lower()]["accuracy"] == 0.5
    assert result["element"]["single"]["num"] == 2


def test_osworld_g(tmp_path: Path):
    picture(tmp_path / "images/1.png")
    shared = {"image_path": "1.png", "image_size": [200, 100], "instruction": "Click it", "GUI_types": ["Icon"]}
    data = [
        {**shared, "id": "b", "box_type": "bbox", "box_coordinates": [20, 10, 40, 20]},
        {**shared, "id": "p", "box_type": "polygon", "box_coordinates": [0, 0, 100, 0, 0, 100]},
        {**shared, "id": "r", "box_type": "refusal", "box_coordinates": [-1, -1, -1, -1]},
        {**shared, "id": "f", "box_type": "bbox", "box_coordinates": [0.1, 0.1, 0.2, 0.2]},
        {**shared, "id": "q", "box_type": "polygon", "box_coordinates": [0, 0, 100, 0]},
        {**shared, "id": "s", "box_type": "refusal", "image_size": [100, 200]},
        {**shared, "id": "o", "box_type": "bbox", "box_coordinates": [300, 10, 40, 20]},
    ]
    (tmp_path / "OSWorld-G_refined.json").write_text(json.dumps(data))
    rows = convert(tmp_path, "osworld-g", "OSWorld-G_refined.json")
    assert dropped(tmp_path) == {
        "box_coordinates is fractions of the image, expected pixels": 1,
        "polygon is not three or more corners": 1,
        "the stated image size is not the file's": 1,
        "box outside the image": 1,
    }
    # (300, 300) is (60, 30): the corner of the box. (600, 600) is (120, 60), right of the polygon's long side.
    result = scored(rows, {"b": "(300, 300)", "p": "(600, 600)", "r": "(-1, -1)"})
    assert {name: score["accuracy"] for name, score in result["element"].items()} == {
        "bbox": 1,
        "polygon": 0,
        "refusal": 1,
    }
    assert result["benchmark"]["osworld-g-refined"]["accuracy"] == 2 / 3
    own = {row["id"]: row["messages"][1]["content"][0]["text"] for row in rows}
    assert own == {"b": "(200, 200)", "p": "(250, 500)", "r": "(-1, -1)"}


def test_ui_vision_takes_the_mean_of_its_three_files(tmp_path: Path, capsys):
    picture(tmp_path / "images/element_grounding/1.png")
    entry = {
        "image_path": "element_grounding/1.png",
        "image_size": [200, 100],
        "bbox": [60, 30, 20, 10],  # corners in the other order, as some are
        "prompt_to_evaluate": "gear",
        "platform": "Gimp",
        "element_type": "icon",
    }
    entries = {"basic": [entry, entry], "functional": [entry], "spatial": [entry, entry | {"bbox": [0, 0, 1, 1]}]}
    for name, rows in entries.items():
        (tmp_path / f"element_grounding_{name}.json").write_text(json.dumps(rows))
    files = [f"element_grounding_{name}.json" for name in entries]
    rows = convert(tmp_path, "ui-vision", *files)
    assert dropped(tmp_path) == {"bbox is fractions of the image, expected pixels": 1}
    assert rows[0]["metadata"]["bbox"] == [20, 10, 60, 30]
    answers = ["(100, 100)", "(0, 0)", "(200, 200)", "(0, 0)"]  # 1 of 2, 1 of 1, 0 of 1
    result = scored(rows, dict(zip([row["id"] for row in rows], answers, strict=True)))
    assert result["benchmark"]["ui-vision"]["macro"] == (0.5 + 1 + 0) / 3
    assert result["benchmark"]["ui-vision"]["accuracy"] == 0.5
    (tmp_path / "other.json").write_text(json.dumps([entry]))
    words = [
        "ui-vision",
        str(tmp_path / "other.json"),
        "--images",
        str(tmp_path / "images"),
        "--out",
        str(tmp_path / "o"),
    ]
    assert main(words) == 2
    assert "expected element_grounding_{basic,functional,spatial}.json" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("entry", [{"data_type": "icon"}, {"ui_type": "icon"}], ids=["v2", "pro"])
def test_screenspot_refuses_fractions(tmp_path: Path, entry: dict):
    picture(tmp_path / "images/1.png")
    entry |= {"img_filename": "1.png", "instruction": "Click", "bbox": [0.1, 0.1, 0.3, 0.4]}
    (tmp_path / "a.json").write_text(json.dumps([entry, entry | {"bbox": [10, 10, 30, 40]}]))
    assert len(convert(tmp_path, "screenspot", "a.json")) == 1
    assert dropped(tmp_path) == {"bbox is fractions of the image, expected pixels": 1}


# ---- the hub's Parquet, pictures in it ----


def write_parquet(path: Path, rows: list[dict]) -> None:
    """As the `datasets` library stores an image column: a struct of the file's bytes and its name."""
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.Table.from_pylist(rows)
    pictures = pa.array([row["image"] for row in rows], image)
    pq.write_table(table.set_column(table.column_names.index("image"), "image", pictures), path)


def as_stored(color: str, size: tuple[int, int] = (200, 100), image_format: str = "PNG") -> dict:
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, image_format)
    return {"bytes": file.getvalue(), "path": None}


HUB_ROWS = {
    "docvqa": {"questionId": "49", "question": "Who?", "question_types": ["form"], "answers": ["Ann"], "docId": 1},
    "infovqa": {"questionId": "9", "question": "How many?", "answers": ["9"], "answer_type": ["single span"]},
    "chartqa": {"type": "human_test", "question": "How many bars?", "answer": "14"},
    "ocrbench": {"dataset": "IIIT5K", "question": "what?", "question_type": "Regular", "answer": ["CENTRE"]},
    "osworld-g": {
        "id": "a", "image_path": "elsewhere.png", "image_size": [200, 100], "instruction": "Click OK",
        "box_type": "bbox", "box_coordinates": [10, 10, 20, 10], "GUI_types": ["Button"],
    },
    "vstar": {"text": "Color?\n(A) red\n(B) blue", "category": "direct_attributes", "question_id": "7", "label": "B"},
    "mcq": {"index": 241, "question": "Which?", "hint": "nan", "A": "x", "B": "y", "C": "nan", "answer": "B",
            "category": "kind", "L2-category": "wide"},
}  # fmt: skip
"""A row of each command's table, without its picture."""
ANSWERS = {"docvqa": "Ann", "infovqa": "9", "chartqa": "14", "ocrbench": "centre", "osworld-g": "(100, 150)",
           "vstar": "B", "mcq": "B"}  # fmt: skip


@pytest.mark.parametrize("command", HUB_ROWS)
def test_parquet_of_the_hub_gives_the_records_of_the_published_files(tmp_path: Path, command: str):
    pictures = [as_stored("red"), as_stored("blue", image_format="JPEG"), {"bytes": b"no picture " * 9, "path": None}]
    key = {"docvqa": "questionId", "infovqa": "questionId", "osworld-g": "id", "vstar": "question_id"}.get(command)
    key = "index" if command == "mcq" else key
    name = "mmbench-dev.parquet" if command == "mcq" else "test-00000-of-00001.parquet"
    rows = [
        HUB_ROWS[command] | {"image": image} | ({key: type(HUB_ROWS[command][key])(10 + i)} if key else {})
        for i, image in enumerate(pictures)
    ]
    write_parquet(tmp_path / name, rows)
    found = convert(tmp_path, command, name, images=None)
    assert dropped(tmp_path) == {"image is no picture": 1}
    names = [row["messages"][0]["content"][0]["image"] for row in found]
    assert [(tmp_path / name).read_bytes() for name in names] == [image["bytes"] for image in pictures[:2]]
    assert [Path(name).suffix for name in names] == [".png", ".jpeg"]
    if key:
        assert [row["id"] for row in found] == ["10", "11"]
    (score,) = scored(found, {row["id"]: ANSWERS[command] for row in found})["benchmark"].values()
    assert score["accuracy"] == 1
    (score,) = scored(found, {row["id"]: "something else" for row in found})["benchmark"].values()
    assert score["accuracy"] == 0
    (tmp_path / name).write_bytes(b"PAR1 no more")
    words = [command, str(tmp_path / name), "--out", str(tmp_path / "out.jsonl"), "--overwrite"]
    assert main(words) == 2


def test_vstar(tmp_path: Path):
    picture(tmp_path / "images/direct_attributes/sa_1.jpg")
    shared = {"image": "direct_attributes/sa_1.jpg", "category": "direct_attributes", "label": "B"}
    asks = "Answer with the option's letter from the given choices directly."
    data = [
        {**shared, "question_id": "0", "text": f"What is the color of the cup?\n(A) red\n(B) blue (dark)\n{asks}"},
        {**shared, "question_id": "1", "text": "Which?\n(A) red\n(C) blue"},
        {**shared, "question_id": "2", "text": "Which?\n(A) red\n(B) blue\nThink first."},
        {**shared, "question_id": "3", "text": "Which?\n(A) red\n(B) blue", "label": "C"},
    ]
    (tmp_path / "test_questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    (row,) = convert(tmp_path, "vstar", "test_questions.jsonl")
    assert dropped(tmp_path) == {
        "options are not lines (A), (B), ... without a gap": 1,
        "text behind the options": 1,
        "label is no letter of its options": 1,
    }
    asked = "What is the color of the cup?\nOptions:\nA. red\nB. blue (dark)"
    assert row["messages"][0]["content"][-1]["text"] == asked
    result = scored([row], {"0": "(B) blue"})
    assert result["benchmark"]["vstar"]["accuracy"] == 1 == result["element"]["direct_attributes"]["accuracy"]
