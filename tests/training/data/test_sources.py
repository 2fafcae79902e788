"""Every container gives the same rows; JSON is read in place, damaged lines and all."""

import json
import pickle
import re
from pathlib import Path

import datasets
import pytest
from PIL import Image

from pixelprune.records.images import read_image
from pixelprune.records.reader import parse_record
from pixelprune.records.record import ImageRef, RecordError
from tests.samples import chat_row, draw_screen, encode, write_jsonl
from training.data.settings import SourceSettings
from training.data.sources import open_source, open_sources

ROWS = [chat_row("a.png", "Wo?", "Hier – 在"), chat_row(None, "x", "y"), chat_row("b.png", '"[{', "]}\\")]


def read_all(source):
    return [parse_record(source.rows[i]) for i in range(len(source))]


def write(kind: str, folder: Path) -> Path:
    if kind == "jsonl":
        return write_jsonl(folder / "d.jsonl", ROWS)
    if kind == "jsonl with blank lines and no last line break":
        path = folder / "d.jsonl"
        path.write_text("\n" + json.dumps(ROWS[0]) + "\r\n \n" + "\n".join(json.dumps(row) for row in ROWS[1:]))
        return path
    if kind.startswith("json array"):
        path = folder / "d.json"
        text = json.dumps(ROWS, ensure_ascii=False, indent=2)
        newline = "\r\n" if "CRLF" in kind else "\r" if "CR" in kind else "\n"
        path.write_text(text, encoding="utf-8-sig" if "BOM" in kind else "utf-8", newline=newline)
        return path
    if kind == "json with lines":
        return write_jsonl(folder / "d.json", ROWS)
    if kind == "folder of jsonl":
        write_jsonl(folder / "1.jsonl", ROWS[:1])
        (folder / "2.jsonl").write_text("")
        write_jsonl(folder / "3.jsonl", ROWS[1:])
        return folder
    if kind == "folder of jsonl and json, named in capitals":
        write_jsonl(folder / "1.JSONL", ROWS[:1])
        (folder / "2.Json").write_text(json.dumps(ROWS[1:]))
        (folder / "report.json").write_text('{"records": 3}')  # data_tools writes these beside records
        (folder / "2.report.json").write_text('{"records": 2}')
        (folder / "2.dropped.jsonl").write_text('{"record": "convert:3"}')
        (folder / "readme.txt").write_text("")
        (folder / "1.jsonl.index").mkdir()
        return folder
    typed = [
        {"messages": [{**m, "content": c if isinstance(c := m["content"], list) else [{"type": "text", "text": c}]}
                      for m in row["messages"]]}
        for row in ROWS
    ]  # fmt: skip
    dataset = datasets.Dataset.from_list(typed)
    if kind == "parquet":
        dataset.to_parquet(folder / "d.parquet")
        return folder / "d.parquet"
    if kind == "saved data set":
        dataset.save_to_disk(folder / "saved")
        return folder / "saved"
    assert kind == "saved splits"
    datasets.DatasetDict({"train": dataset, "other": dataset.select([0])}).save_to_disk(folder / "saved")
    return folder / "saved"


@pytest.mark.parametrize(
    "kind",
    ["jsonl", "jsonl with blank lines and no last line break", "json array", "json array with a BOM",
     "json array with CRLF", "json array with CR", "json array with CRLF and a BOM", "json with lines",
     "folder of jsonl", "folder of jsonl and json, named in capitals", "parquet", "saved data set", "saved splits"],
)  # fmt: skip
def test_containers_give_the_same_records(kind, tmp_path):
    source = open_source(SourceSettings(str(write(kind, tmp_path))))
    expected = [parse_record(row) for row in ROWS]
    assert read_all(source) == expected
    assert read_all(pickle.loads(pickle.dumps(source))) == expected
    assert len({source.record_id(i) for i in range(len(source))}) == 3
    assert source.rows.where(2)


def test_datasets_image_feature_stays_encoded(tmp_path):
    png = encode(draw_screen(0))
    rows = {
        "conversations": [[{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "a"}]],
        "images": [[{"bytes": png, "path": None}]],
    }
    dataset = datasets.Dataset.from_dict(rows).cast_column("images", datasets.List(datasets.Image()))
    dataset.to_parquet(tmp_path / "d.parquet")
    (record,) = read_all(open_source(SourceSettings(str(tmp_path / "d.parquet"))))
    assert record.images == [ImageRef(png)]


def test_mixed_file_with_damaged_lines(tmp_path):
    sharegpt = {"conversations": [{"from": "human", "value": "h"}, {"from": "gpt", "value": "g"}]}
    path = write_jsonl(tmp_path / "d.jsonl", [ROWS[1], "{not json", sharegpt, "x", '"\xff', "[" * 100_000])
    rows = open_source(SourceSettings(str(path))).rows
    assert len(rows) == 6
    assert parse_record(rows[2]).messages[0].text == "h"
    for bad in (1, 3, 4, 5):
        with pytest.raises(RecordError) as caught:
            rows[bad]
        assert caught.value.reason == "invalid_json"
        assert f"record {bad + 1}" in rows.where(bad)


@pytest.mark.parametrize(
    ("content", "name", "match"),
    [
        ("", "d.jsonl", "holds no records"),
        ("[]", "d.json", "holds no records"),
        ('[{"a": 1}, {"a": ', "d.json", "damaged after 1 records"),
        ('[{"a": 1} {"a": 2}]', "d.json", "damaged after 1 records"),
        ("a,b", "d.csv", "holds no records"),
        ("a,b", "d.txt", "expected .jsonl"),
    ],
)
def test_unusable_files_are_refused(tmp_path, content, name, match):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=match):
        open_source(SourceSettings(str(tmp_path / name)))


def test_a_folder_of_two_kinds_is_refused(tmp_path):
    datasets.Dataset.from_list([{"a": 1}]).to_parquet(tmp_path / "d.PARQUET")
    assert len(open_source(SourceSettings(str(tmp_path)))) == 1
    write("jsonl", tmp_path)
    with pytest.raises(ValueError, match="holds JSON and Parquet files"):
        open_source(SourceSettings(str(tmp_path)))


def test_a_path_that_is_not_there_is_a_typo_and_no_network_is_asked(tmp_path, monkeypatch):
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        if name == "some/data":
            return datasets.Dataset.from_list([{"id": 1}])
        raise ConnectionError("no way there\nand more")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    write("jsonl", tmp_path)
    for path, words in {
        "d.jsnl": r"did you mean d\.jsonl\?",
        str(tmp_path / "dd" / "e" / "f.jsonl"): "there is no .*dd$",
        "owner/name": "written hf://datasets/owner/name",
        "d.jsonl/e": "no such file or folder",
    }.items():
        with pytest.raises(ValueError) as caught:
            open_source(SourceSettings(path))
        assert re.search(words, str(caught.value).removesuffix(" (sources[].path)")), caught.value
    assert asked == []
    source = open_source(SourceSettings("hf://datasets/some/data", split="test"))
    assert source.rows[0] == {"id": 1}
    assert source.name == "data"
    assert asked == [("some/data", "test")]
    with pytest.raises(ValueError, match=r"hub: no way there$"):
        open_source(SourceSettings("hf://datasets/other/data"))


def test_refused_settings(tmp_path):
    path = str(write("jsonl", tmp_path))
    with pytest.raises(ValueError, match=r"sources\[\].path"):
        open_source(SourceSettings(str(tmp_path / "none.jsonl")))
    with pytest.raises(ValueError, match=r"sources\[\].root"):
        open_source(SourceSettings(path, root=str(tmp_path / "none")))
    with pytest.raises(ValueError, match=r"sources\[\].weight"):
        open_source(SourceSettings(path, weight=float("nan")))
    with pytest.raises(ValueError, match="two sources"):
        open_sources([SourceSettings(path), SourceSettings(path)])
    with pytest.raises(ValueError, match=r"data\.sources"):
        open_sources([])
    assert [s.name for s in open_sources([SourceSettings(path), SourceSettings(path, name="b")])] == ["d", "b"]


FINE = b"\x89PNG\r\n\x1a\n and so on"


def test_images_stay_inside_the_root(tmp_path):
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    outside = tmp_path / "outside.png"
    outside.write_bytes(b"secret")
    (root / "a.png").write_bytes(FINE)
    (root / "empty.png").write_bytes(b"")
    (root / "link.png").symlink_to(outside)
    (root / "inner.png").symlink_to(root / "a.png")
    (root / "loop.png").symlink_to(root / "loop.png")
    (tmp_path / "root2").mkdir()
    (tmp_path / "root2" / "a.png").write_bytes(b"secret")
    for good in ("a.png", "sub/../a.png", str(root / "a.png"), "inner.png", "./a.png"):
        assert read_image(ImageRef(good), root) == FINE
    expected = {
        "../outside.png": "outside_root",
        str(outside): "outside_root",
        "/etc/passwd": "outside_root",
        "link.png": "outside_root",
        "../root2/a.png": "outside_root",
        "../missing.png": "outside_root",
        "missing.png": "missing_file",
        "empty.png": "empty_file",
        "sub": "unreadable_file",
        "loop.png": "unreadable_file",
        "a\0.png": "unreadable_file",
        "a" * 5000: "unreadable_file",
    }
    for path, reason in expected.items():
        with pytest.raises(RecordError) as caught:
            read_image(ImageRef(path), root)
        assert caught.value.reason == reason, path
    with pytest.raises(RecordError, match="no root"):
        read_image(ImageRef("a.png"), None)
    picture = Image.new("RGB", (2, 2))
    assert read_image(ImageRef(picture), None) is picture


def test_ndjson_is_json_lines(tmp_path):
    rows = [chat_row(None, answer=str(number)) for number in range(3)]
    path = write_jsonl(tmp_path / "a.ndjson", rows)
    for given in (path, tmp_path):
        source = open_source(SourceSettings(path=str(given)))
        assert [source.rows[row] for row in range(len(source))] == rows
