"""What must not end a run: odd rows, names that are no text. What ends it in one line: data files that shrink."""

import dataclasses
import os
import pickle
import re
import subprocess
import sys

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pixelprune.pack import VisionGeometry
from pixelprune.records.prepare import PrepareSettings
from pixelprune.settings import PruneSettings, ResizeSettings
from tests.pixelprune.records.test_bounded_work import not_for_ever
from tests.ranks import ROOT
from tests.samples import chat_row, draw_screen, write_jsonl
from tests.training.data import mutants
from training.composition.toy import toy_config
from training.data import index_builder
from training.data.index_builder import build_index
from training.data.loader import LoaderSettings, PackLoader
from training.data.plan import PlanSettings
from training.data.quarantine import append_quarantine, read_quarantine
from training.data.settings import DataSettings, SourceSettings
from training.data.sources import open_source
from training.errors import RankError, UserError


@pytest.fixture
def prepare(model_folder) -> PrepareSettings:
    return PrepareSettings(str(model_folder), PruneSettings(), ResizeSettings(min_pixels=32 * 32))


def build(path, prepare, **options):
    return build_index([SourceSettings(str(path))], prepare, **({"num_workers": 0, "show_progress": False} | options))


def reasons(index) -> dict[str, str]:
    return {entry.record: entry.reason for entry in index.quarantined}


def test_what_an_image_may_be_called_or_be(tmp_path, prepare):
    os.mkfifo(tmp_path / "fifo.png")
    undecodable = os.fsdecode(b"\xff\xfe.png")
    (tmp_path / undecodable).write_bytes(b"no image")
    names = ["data:image/png;base64,é", undecodable, "fifo.png", "\udcff none.png", "a\nb\tc.png"]
    write_jsonl(tmp_path / "d.jsonl", [chat_row(None), *map(chat_row, names)])
    with not_for_ever():
        index = build(tmp_path / "d.jsonl", prepare)
    assert len(index) == 1
    expected = ["bad_image", "not_an_image", "unreadable_file", "missing_file", "missing_file"]
    assert list(reasons(index).values()) == expected
    index.checked(DataSettings(max_quarantined_share=0.9), tmp_path / "quarantine.jsonl")
    assert len(read_quarantine(tmp_path / "quarantine.jsonl")) == len(names)
    assert [entry.record for entry in build(tmp_path / "d.jsonl", prepare).quarantined] == [*reasons(index)], "reused"


def chat_table(texts: list[bytes], **columns) -> pa.Table:
    """One record per text, which is written as its bytes are; pyarrow itself would not take them as a string."""
    content = pa.Array.from_buffers(
        pa.string(),
        len(texts),
        [None, pa.py_buffer(np.cumsum([0, *map(len, texts)], dtype=np.int32)), pa.py_buffer(b"".join(texts))],
    )
    roles = pa.array(["user", "assistant"] * len(texts))
    answers = pa.array(["yes"] * len(texts))
    said = pa.concat_arrays([content, answers]).take(
        pa.array([k for i in range(len(texts)) for k in (i, i + len(texts))])
    )
    turns = pa.StructArray.from_arrays([roles, said], ["role", "content"])
    messages = pa.ListArray.from_arrays(pa.array(range(0, 2 * len(texts) + 1, 2), pa.int32()), turns)
    return pa.table({"messages": messages, **columns})


def test_a_row_of_parquet_that_python_cannot_hold_is_one_row(tmp_path, prepare):
    pq.write_table(chat_table([b"fine", b"\xff\xfe bad", b"fine too"]), tmp_path / "text.parquet")
    far = pa.array([0, 0, 10**18], pa.timestamp("us"))
    pq.write_table(chat_table([b"a", b"b", b"c"], timestamp=far), tmp_path / "time.parquet")
    for name, bad in (("text", 1), ("time", 2)):
        index = build(tmp_path / f"{name}.parquet", prepare)
        assert reasons(index) == {f"{name}:{bad}": "unexpected"}
        (entry,) = index.quarantined
        assert f"row {bad}" in entry.file
        assert len(entry.detail) > 20


def test_a_data_file_that_shrinks_is_named(tmp_path, prepare, tokenizer, cost):
    for i in range(8):
        draw_screen(i).save(tmp_path / f"{i}.png")
    path = write_jsonl(tmp_path / "d.jsonl", [chat_row(f"{i}.png", f"Question {i}") for i in range(8)])
    index = build(path, prepare)
    os.truncate(path, path.stat().st_size // 2)
    plan = PlanSettings(samples_per_step=8, pack_tokens=1000, pack_patches=10_000)
    geometry = VisionGeometry.from_config(toy_config(tokenizer))
    for num_workers in (0, 1):
        settings = LoaderSettings(num_workers=num_workers)
        with pytest.raises(UserError, match=r"d\.jsonl: the data file has become shorter.*a record ended at byte"):
            list(PackLoader(index, index.plan_input(cost), plan, prepare, geometry, settings))


def test_a_template_that_adds_a_list_to_a_string_costs_the_records_that_it_does_so_with(tmp_path, prepare):
    model = mutants.write_model_folder(tmp_path / "model", "adds lists to strings")
    draw_screen(1).save(tmp_path / "a.png")
    path = write_jsonl(tmp_path / "d.jsonl", [chat_row(None), chat_row("a.png")])
    index = build(path, dataclasses.replace(prepare, model_path=str(model)))
    assert reasons(index) == {"d:1": "unexpected"}
    assert index.quarantined[0].detail.startswith("TypeError: ")
    assert len(index) == 1


def write_arrow(path, rows):
    """One batch a row, as writers that flush often leave them: what is cut off is behind the first rows."""
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=1)
    return path, path


def write_saved(path, rows):
    datasets.Dataset.from_list(rows).save_to_disk(str(path), num_shards=2)
    return path, path / "data-00001-of-00002.arrow"


@pytest.mark.parametrize(("write", "name"), [(write_arrow, "d.arrow"), (write_saved, "d")])
def test_a_mapped_data_file_that_shrinks_is_named_and_ends_nobody_by_a_signal(tmp_path, write, name):
    """As it is opened, and in a worker that gets the rows by pickle and maps the file again."""
    path, cut_file = write(tmp_path / name, [{"query": f"{i} {'x' * 9000}", "response": "yes"} for i in range(8)])
    rows = open_source(SourceSettings(str(path))).rows
    whole, before_it_opens, after_it_opened = pickle.dumps(rows), pickle.loads(pickle.dumps(rows)), rows
    expected = [after_it_opened[i] for i in range(8)]
    assert [pickle.loads(whole)[i] for i in range(8)] == expected
    os.truncate(cut_file, cut_file.stat().st_size // 2)
    for opened in (before_it_opens, after_it_opened, pickle.loads(whole)):
        with pytest.raises(UserError, match=rf"{cut_file.name}: the file has become shorter") as caught:
            opened[7]
        assert "\n" not in str(caught.value)
    if name == "d":
        assert after_it_opened[0] == expected[0], "of the other file"


def test_a_data_file_that_shrinks_while_it_is_indexed_is_named(tmp_path, prepare, monkeypatch):
    path = write_jsonl(tmp_path / "d.jsonl", [chat_row(None, f"Question {i}") for i in range(8)])

    original = index_builder.open_sources
    monkeypatch.setattr(
        index_builder,
        "open_sources",
        lambda *settings: (original(*settings), os.truncate(path, path.stat().st_size // 2))[0],
    )
    with pytest.raises(UserError, match=r"d\.jsonl: the data file has become shorter"):
        build(path, prepare)


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def zeroed(path):
    """As a power cut leaves a file whose length came to the disk and whose pages did not; its end did."""
    with path.open("r+b") as file:
        file.seek(20)
        file.write(bytes(60))


def emptied(path):
    os.truncate(path, 0)


@pytest.mark.parametrize("damage", [cut, zeroed, emptied])
def test_an_index_that_a_power_cut_damaged_is_measured_again(tmp_path, prepare, damage, monkeypatch, caplog):
    path = write_jsonl(tmp_path / "d.jsonl", [chat_row(None, f"Question {i}") for i in range(20)])
    whole = build(path, prepare)
    (table,) = whole.files
    monkeypatch.setattr(index_builder, "CHUNK_ROWS", 8)
    # A part, as a killed build leaves it, damaged beside whole ones; then the table.
    table.unlink()
    with monkeypatch.context() as patched:
        patched.setattr(index_builder, "_join_parts", lambda source, folder: None)
        with pytest.raises(ValueError, match="parts of the index"):
            build(path, prepare)
    parts = sorted(table.parent.glob("part-*"))
    assert len(parts) == 3
    damage(parts[1])
    rows = []
    original = index_builder.row_steps
    monkeypatch.setattr(index_builder, "row_steps", lambda *args: (rows.append(args[2]), original(*args))[1])
    again = build(path, prepare)
    assert rows == list(range(8, 16)), "the damaged part alone"
    damage(table)
    rows.clear()
    last = build(path, prepare)
    assert rows == list(range(20))
    for index in (again, last):
        np.testing.assert_array_equal(index.content_hash, whole.content_hash)
    assert caplog.text.count("is damaged and measured again") == 2
    rows.clear()
    build(path, prepare)
    assert not rows


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_index_that_finds_no_room_is_one_line(tmp_path, prepare, num_workers):
    path = write_jsonl(tmp_path / "d.jsonl", [chat_row(None, f"Question {i}") for i in range(300)])
    code = "\n".join(
        [
            "import resource, signal, sys",
            "from tests.training.data.test_hostile_data import build",
            "from pixelprune.records.prepare import PrepareSettings",
            "from pixelprune.settings import PruneSettings, ResizeSettings",
            "from training.command import run_command",
            f"prepare = PrepareSettings({prepare.model_path!r}, PruneSettings(), ResizeSettings())",
            "if __name__ == '__main__':",
            "    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))",
            f"    do = lambda: build({str(path)!r}, prepare, num_workers={num_workers}, max_seconds=600)",
            "    sys.exit(run_command(do))",
        ]
    )
    (tmp_path / "program.py").write_text(code)
    done = subprocess.run(
        [sys.executable, tmp_path / "program.py"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 2, done.stderr
    assert re.search(r"error: .*parquet: the index cannot be written: .*too large.*data\.index_dir", done.stderr)
    assert "Traceback" not in done.stderr


def test_a_quarantine_that_finds_no_room_ends_the_run_or_is_said(tmp_path, prepare, caplog):
    path = write_jsonl(tmp_path / "d.jsonl", [chat_row(None), chat_row("none.png")])
    index, settings = build(path, prepare), DataSettings(max_quarantined_share=0.9)
    report = tmp_path / "gone" / "quarantine.jsonl"  # no such folder: not to be written
    with pytest.raises(RankError, match=r"the quarantine cannot be written: .*checkpoint\.on_error=continue"):
        index.checked(settings, report)
    assert len(index.checked(settings, report, go_on=True)) == 1
    assert "the quarantine cannot be written: No such file or directory; going on without it" in caplog.text
    caplog.clear()
    append_quarantine(report, index.quarantined[0])
    assert "quarantined d:1" in caplog.text
    assert "what was quarantined cannot be written" in caplog.text
