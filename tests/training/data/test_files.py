"""Compressed, pretty-printed, wrapped, tabular files give the rows of plain JSON lines, or are refused by name."""

import csv
import gzip
import json
import multiprocessing
import pickle
import subprocess
import sys

import pyarrow as pa
import pytest

from pixelprune.records.reader import parse_record
from pixelprune.records.record import RecordError
from tests.samples import chat_row, write_jsonl
from training.data.files import json_rows, unpacked
from training.data.settings import SourceSettings
from training.data.sources import open_source

ROWS = [chat_row("a.png", "Wo?", "Hier – 在"), chat_row(None, "x\ny", "z"), chat_row("b.png", '"[{', "]}\\")]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def pretty(value) -> str:
    return json.dumps(value, ensure_ascii=False, indent=2)


TEXTS = {
    "d.jsonl.gz": gzip.compress(LINES),
    "two members.jsonl.GZ": gzip.compress(LINES[:50]) + gzip.compress(LINES[50:]),
    "d.ndjson.zst": pa.compress(LINES, codec="zstd", asbytes=True),
    "d.json.gz": gzip.compress(json.dumps(ROWS).encode()),
    "lines.json.gz": gzip.compress(LINES),
    "pretty.json": "\n".join(map(pretty, ROWS)).encode(),
    "pretty.jsonl": ("\ufeff" + "\r\n\r\n".join(map(pretty, ROWS))).encode(),
    "array.jsonl": pretty(ROWS).encode(),
    "wrapped.json": pretty({"version": "1", "data": ROWS, "license": "x"}).encode(),
    "wrapped in one line.json": json.dumps({"data": ROWS}).encode(),
    "wrapped.json.zst": pa.compress(json.dumps({"data": ROWS}).encode(), codec="zstd", asbytes=True),
}


@pytest.mark.parametrize("name", TEXTS)
def test_text_files_give_the_rows_of_json_lines(name, tmp_path):
    (tmp_path / name).write_bytes(TEXTS[name])
    source = open_source(SourceSettings(str(tmp_path / name)))
    assert [source.rows[i] for i in range(len(source))] == ROWS
    again = pickle.loads(pickle.dumps(source))
    assert [again.rows[i] for i in (2, 0, 1)] == [ROWS[2], ROWS[0], ROWS[1]]
    assert name in source.rows.where(1), "the user knows the file by its own name"
    assert source.name == name.partition(".")[0]
    assert source.root == tmp_path


def test_one_record_alone_and_a_damaged_first_line(tmp_path):
    (tmp_path / "one.json").write_text(pretty(ROWS[0]))
    source = open_source(SourceSettings(str(tmp_path / "one.json")))
    assert [source.rows[i] for i in range(len(source))] == ROWS[:1]
    write_jsonl(tmp_path / "cut.json", ['{"messages": [', *ROWS])
    source = open_source(SourceSettings(str(tmp_path / "cut.json")))
    assert len(source) == 4, "one damaged line costs one record"
    assert source.rows[1] == ROWS[0]
    (tmp_path / "no_wrap.json").write_text(json.dumps({"data": "a name", **ROWS[0]}))
    source = open_source(SourceSettings(str(tmp_path / "no_wrap.json")))
    assert source.rows[0]["data"] == "a name"


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("d.json", pretty({"data": ROWS, "chosen": 1}).encode(), "'data' and 'chosen'"),
        ("d.json", pretty(ROWS[0]).encode()[:-3], "damaged after 0 records"),
        ("d.json", (pretty(ROWS[0]) + "\n" + pretty(ROWS[1])[:-3]).encode(), "damaged after 1 records"),
        ("d.jsonl.gz", gzip.compress(LINES)[:-9], "damaged, or no gzip"),
        ("d.jsonl.zst", LINES, "damaged, or no zstd"),
        ("d.jsonl.gz", gzip.compress(b""), "holds no records"),
        ("d.tsv.gz", b"x", "suffix, expected .jsonl"),
        ("d.parquet.zst", b"x", r"compressed, .* unpack it to a .parquet first \(zstd -d\)"),
        ("d.tar.gz", b"x", r"compressed, .* unpack it to a .tar first \(gunzip\)"),
        ("d.tgz", b"x", r"compressed, .* unpack it to a .tar first \(gunzip\)"),
        ("d.arrow", b"ARROW1 or not", "no Arrow file"),
        ("d.arrow", b"", "no Arrow file"),
        ("d.csv", b"a,a\n1,2\n", "names that differ"),
    ],
)
def test_what_is_refused_is_named(name, content, match, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=match) as caught:
        open_source(SourceSettings(str(tmp_path / name)))
    assert name in str(caught.value)
    if "unpack it" in match:
        with pytest.raises(ValueError, match=match):
            open_source(SourceSettings(str(tmp_path)))


def test_a_changed_file_is_unpacked_anew_and_an_unchanged_one_is_not(tmp_path):
    path = tmp_path / "d.jsonl.gz"
    path.write_bytes(gzip.compress(LINES))
    open_source(SourceSettings(str(path)), str(tmp_path / "side"))
    folder = tmp_path / "side" / "d.jsonl.gz" / "unpacked"
    (made,) = folder.glob("*.jsonl")
    before = made.stat().st_mtime_ns
    open_source(SourceSettings(str(path)), str(tmp_path / "side"))
    assert [file.stat().st_mtime_ns for file in folder.glob("*.jsonl")] == [before]
    path.write_bytes(gzip.compress(json.dumps(ROWS[1]).encode()))
    assert len(open_source(SourceSettings(str(path)), str(tmp_path / "side"))) == 1
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"data\.index_dir"):
        open_source(SourceSettings(str(path)), str(tmp_path / "file"))


def test_processes_that_unpack_at_once_get_the_same_rows(tmp_path):
    path = tmp_path / "d.jsonl.gz"
    path.write_bytes(gzip.compress(LINES * 2000))
    code = (
        "import sys; from training.data.sources import open_source; from training.data.settings import SourceSettings; "
        "print(len(open_source(SourceSettings(sys.argv[1]))))"
    )
    runs = [
        subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    assert [run.communicate()[0].strip() for run in runs] == ["6000", "6000"]
    assert len(list((tmp_path / "d.jsonl.gz.index" / "unpacked").glob("*.jsonl"))) == 1


@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz", "d.json"])
def test_a_record_above_the_cap_costs_itself(name, tmp_path, monkeypatch):
    monkeypatch.setattr(json_rows, "MAX_RECORD_BYTES", 3000)
    monkeypatch.setattr(unpacked, "MAX_RECORD_BYTES", 3000)
    monkeypatch.setattr(unpacked, "CHUNK_BYTES", 1000)
    bomb = chat_row(None, "a" * 100_000)
    rows = [ROWS[0], bomb, chat_row(None, "b" * 2800), bomb, ROWS[1]]
    text = json.dumps(rows) if name == "d.json" else "\n".join(map(json.dumps, rows))
    (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    source = open_source(SourceSettings(str(tmp_path / name)))
    assert [source.rows[i] for i in (0, 2, 4)] == [rows[0], rows[2], rows[4]]
    for i in (1, 3):
        with pytest.raises(RecordError) as caught:
            source.rows[i]
        assert caught.value.reason == "record_too_large"
    for made in (tmp_path / f"{name}.index").rglob("*.jsonl"):
        assert made.stat().st_size < 4 * 3100, "a bomb is not written to the disk whole"


def write_csv(path, rows):
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerows(rows)
    return path


def test_csv_rows_are_records(tmp_path):
    rows = [
        ["instruction", "output", "image", "images", "weight", "conversations"],
        ['<image>Say "a,\r\nb"', "[1, 2]", "a.png", "", "0.5", ""],
        ["", "", "", '["a.png", "b.png"]', "",
         json.dumps([{"from": "human", "value": "<image><image>"}, {"from": "gpt", "value": "–"}])],
    ]  # fmt: skip
    source = open_source(SourceSettings(str(write_csv(tmp_path / "d.csv", rows))))
    source = pickle.loads(pickle.dumps(source))
    first, second = (parse_record(source.rows[i]) for i in range(len(source)))
    turns = [{"role": "user", "content": '<image>Say "a,\r\nb"'}, {"role": "assistant", "content": "[1, 2]"}]
    assert first == parse_record({"messages": turns, "image": "a.png", "weight": 0.5})
    assert [image.source for image in second.images] == ["a.png", "b.png"]
    assert second.messages[1].text == "–"


def test_a_damaged_csv_row_costs_itself(tmp_path):
    text = 'query,response,weight\na,b\nc,d,1\ne,f,heavy\n\n"g",h,\n"i"j,k,\n'
    (tmp_path / "d.csv").write_text(text)
    source = open_source(SourceSettings(str(tmp_path / "d.csv")))
    assert [source.rows[i] for i in (1, 3)] == [
        {"query": "c", "response": "d", "weight": 1},
        {"query": "g", "response": "h"},
    ]
    for i in (0, 2, 4):
        with pytest.raises(RecordError) as caught:
            source.rows[i]
        assert caught.value.reason == "invalid_csv"
    assert len(source) == 5


@pytest.mark.parametrize("has_footer", [True, False])
def test_arrow_files_are_mapped_in_every_process(has_footer, tmp_path):
    turns = [[{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": "a"}] for i in range(5)]
    table = pa.table({"messages": turns})
    new = pa.ipc.new_file if has_footer else pa.ipc.new_stream
    for number, part in enumerate((table.slice(0, 2), table.slice(2))):
        with new(str(tmp_path / f"{number}.arrow"), table.schema) as writer:
            writer.write_table(part, max_chunksize=2)
    source = open_source(SourceSettings(str(tmp_path)))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(source.rows.__getitem__, range(5)) == [{"messages": turn} for turn in turns]
    with new(str(tmp_path / "2.arrow"), pa.schema([("a", pa.int64())])) as writer:
        writer.write_table(pa.table({"a": [1]}))
    with pytest.raises(ValueError, match="other columns"):
        open_source(SourceSettings(str(tmp_path)))


def names_read(folder, split="train"):
    source = open_source(SourceSettings(str(folder), split=split))
    return [source.rows[i]["id"] for i in range(len(source))]


def make(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        write_jsonl(folder / name, [{"id": name}])
    return folder


def test_a_snapshot_of_the_hub_obeys_split(tmp_path):
    shards = [f"train-0000{i}-of-00002.jsonl" for i in range(2)]
    folder = make(tmp_path, *shards, "test-00000-of-00001.jsonl", "validation.jsonl", "extra_long-00000-of-00001.jsonl")
    assert names_read(folder) == shards
    assert names_read(folder, "test") == ["test-00000-of-00001.jsonl"]
    assert names_read(folder, "val") == ["validation.jsonl"]
    assert names_read(folder, "extra_long") == ["extra_long-00000-of-00001.jsonl"]
    with pytest.raises(ValueError, match=r"no file of split 'other', it has .*sources\[\]\.split"):
        names_read(folder, "other")
    make(tmp_path, "more.jsonl")
    with pytest.raises(ValueError, match=r"more\.jsonl beside the splits"):
        names_read(folder)


def test_splits_stand_in_the_folder_data_too_and_words_that_only_begin_alike_are_none(tmp_path):
    make(tmp_path / "a" / "data", "dev_1.jsonl", "train_1.jsonl")
    assert names_read(tmp_path / "a") == ["train_1.jsonl"]
    plain = make(tmp_path / "b", "testament.jsonl", "trains.jsonl", "my-test.jsonl")
    assert names_read(plain) == ["my-test.jsonl", "testament.jsonl", "trains.jsonl"]
    one = make(tmp_path / "c", "train.jsonl", "documents.jsonl")
    assert names_read(one) == ["documents.jsonl", "train.jsonl"], "one split alone is no mixture"
    with pytest.raises(ValueError, match="no file of split 'train', it has test"):
        names_read(make(tmp_path / "d", "test.jsonl"))
