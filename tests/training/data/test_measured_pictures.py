"""A screenshot of many records is decoded once; rows are those that one record after another gives."""

import dataclasses

import numpy as np
import pytest

from pixelprune.records.prepare import PrepareSettings
from pixelprune.sessions import pruning
from pixelprune.settings import PruneSettings, ResizeSettings
from tests.samples import chat_row, draw_screen, write_jsonl
from training.data import index_builder
from training.data.index_builder import build_index
from training.data.measuring import pictures as pictures_file
from training.data.measuring.pictures import MeasuredPictures
from training.data.measuring.row import measure_row, measured_rows, row_steps
from training.data.settings import SourceSettings
from training.data.sources import open_source

COLUMNS = (
    "row", "content_hash", "text_tokens", "num_supervised", "kept_blocks", "full_blocks", "prefix_hash", "prefix_text",
    "picture_hash",
)  # fmt: skip


@pytest.fixture
def prepare(model_folder) -> PrepareSettings:
    return PrepareSettings(str(model_folder), PruneSettings(), ResizeSettings(min_pixels=32 * 32))


@pytest.fixture
def shared(tmp_path):
    """60 records of three screenshots, one of these in two sizes, between texts and records that cannot be used."""
    for number in range(3):
        draw_screen(seed=number).save(tmp_path / f"screen_{number}.png")
    rows = [chat_row(f"screen_{i % 3}.png", f"Question {i % 7}?") for i in range(60)]
    rows[9]["messages"][0]["content"][0]["max_pixels"] = 64 * 64
    rows[4], rows[13] = chat_row(None, "No picture."), chat_row("none.png")
    rows[20] = {"messages": []}
    rows[33] = chat_row(None, "<|im_start|>")
    write_jsonl(tmp_path / "train.jsonl", rows)
    return tmp_path


@pytest.fixture
def decoded(monkeypatch):
    """Pictures decoded so far."""
    sources = []
    original = pruning.decode_pixels
    monkeypatch.setattr(pruning, "decode_pixels", lambda *args: (sources.append(len(args[0])), original(*args))[1])
    return sources


def rows_of(folder, prepare, pictures):
    source, preparer = open_source(SourceSettings(str(folder / "train.jsonl"))), prepare.build()
    return list(measured_rows(lambda row: row_steps(preparer, source, row, pictures), range(len(source))))


@pytest.mark.parametrize("strategy", ["pred2d", "pred3d", "resize"])
def test_rows_are_those_of_one_record_after_another(shared, prepare, decoded, strategy):
    prepare = dataclasses.replace(prepare, prune=PruneSettings(strategy=strategy))
    source, preparer = open_source(SourceSettings(str(shared / "train.jsonl"))), prepare.build()
    alone = [measure_row(preparer, source, row) for row in range(len(source))]
    assert len(decoded) == 56
    decoded.clear()
    assert rows_of(shared, prepare, MeasuredPictures()) == alone
    assert len(decoded) == 4, "three screenshots, one in two sizes"
    assert sorted({row["reason"] for row in alone}) == ["", "empty_conversation", "missing_file", "special_token"]


def test_processes_tell_each_other_and_a_killed_build_those_of_its_next_start(shared, prepare, decoded, tmp_path):
    folder = tmp_path / "index"
    folder.mkdir()
    expected = rows_of(shared, prepare, MeasuredPictures(folder))
    decoded.clear()
    (file,) = folder.glob("pictures-*.bin")
    whole = file.read_bytes()

    def rows_after(content: bytes):
        decoded.clear()
        file.write_bytes(content)
        pictures = MeasuredPictures(folder)
        pictures.look_around()
        rows = rows_of(shared, prepare, pictures)
        for other in set(folder.glob("pictures-*.bin")) - {file}:
            other.unlink()
        return rows

    for content, num_decoded in (
        (whole, 0),
        (whole[:-1], 1),  # killed within its last entry
        (whole[:20] + b"?" + whole[21:], 4),  # a damaged one hides those behind it
        (b"", 4),
    ):
        assert rows_after(content) == expected
        assert len(decoded) == num_decoded


def test_a_file_that_grows_is_read_on(shared, prepare, decoded, tmp_path, monkeypatch):
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setattr(pictures_file, "LOOK_SECONDS", 0.0)
    one, other = MeasuredPictures(folder), MeasuredPictures(folder)
    source, preparer = open_source(SourceSettings(str(shared / "train.jsonl"))), prepare.build()
    for row in range(6):
        for pictures in (one, other):
            pictures.look_around()
            list(measured_rows(lambda row, pictures=pictures: row_steps(preparer, source, row, pictures), [row]))
    assert len(decoded) == 3


def test_what_is_remembered_has_a_limit(shared, prepare, decoded, monkeypatch):
    monkeypatch.setattr(pictures_file, "MAX_BYTES", 100)
    assert rows_of(shared, prepare, MeasuredPictures()) == rows_of(shared, prepare, MeasuredPictures())
    assert len(decoded) > 8


def test_an_index_decodes_a_screenshot_once_and_leaves_no_files(shared, prepare, decoded, monkeypatch):
    sources = [SourceSettings(str(shared / "train.jsonl"))]
    apart = build_index(sources, prepare, num_workers=0, show_progress=False, index_dir=str(shared / "apart"))
    assert len(decoded) == 4
    monkeypatch.setattr(index_builder, "CHUNK_ROWS", 8)
    together = build_index(sources, prepare, num_workers=2, show_progress=False, index_dir=str(shared / "together"))
    for name in COLUMNS:
        np.testing.assert_array_equal(getattr(apart, name), getattr(together, name))
    assert not list(shared.rglob("pictures-*.bin"))
