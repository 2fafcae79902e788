"""Remote sources: the rows and images of the same local files; which addresses are refused, and what none repeats."""

import io
import json
import logging
import pickle
import tarfile

import fsspec
import pytest

from pixelprune.records.images import read_image
from pixelprune.records.prepare import PrepareSettings
from pixelprune.records.reader import parse_record
from pixelprune.records.record import ImageRef, RecordError
from pixelprune.settings import PruneSettings, ResizeSettings
from tests.samples import chat_row, draw_screen, encode
from training.config.recipe import load_recipe
from training.data.files import address
from training.data.files.remote import RemoteFolder
from training.data.index_builder import build_index
from training.data.settings import SourceSettings
from training.data.sources import open_source

PNG = encode(draw_screen(1))
ROWS = [chat_row("img/a.png"), chat_row("../other/b.png"), chat_row("img/gone.png")]


@pytest.fixture
def bucket(monkeypatch):
    """A file system in memory, with a data set of two splits."""
    monkeypatch.setitem(address.SCHEMES, "memory", "fsspec")
    store = fsspec.filesystem("memory")
    store.store.clear()
    store.pseudo_dirs[:] = [""]
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    store.pipe("/set/data/train-00000-of-00001.jsonl", lines)
    store.pipe("/set/data/test-00000-of-00001.jsonl", lines[: lines.index(b"\n")])
    store.pipe("/set/img/a.png", PNG)
    store.pipe("/other/b.png", PNG)
    store.pipe("/setting/a.png", PNG)
    yield store
    store.store.clear()


def test_a_remote_folder_is_the_local_one(bucket, tmp_path):
    source = open_source(SourceSettings("memory://set"), str(tmp_path))
    assert [source.rows[i] for i in range(len(source))] == ROWS
    assert source.rows.where(0) == "memory://set/data/train-00000-of-00001.jsonl, record 1"
    again = pickle.loads(pickle.dumps(source))
    (image,) = parse_record(again.rows[0]).images
    assert read_image(image, again.root) == PNG
    test = open_source(SourceSettings("memory://set", split="test"), str(tmp_path))
    assert len(test) == 1
    assert test.fingerprint != source.fingerprint
    one = open_source(SourceSettings("memory://set/data/test-00000-of-00001.jsonl", root="memory://set"), str(tmp_path))
    assert read_image(parse_record(one.rows[0]).images[0], one.root) == PNG
    assert one.name == "test-00000-of-00001"


def test_it_is_copied_once_and_anew_when_it_changes(bucket, tmp_path):
    path = "memory://set/data/test-00000-of-00001.jsonl"
    first = open_source(SourceSettings(path), str(tmp_path))
    (copy,) = tmp_path.rglob("*-test-00000-of-00001.jsonl")
    before = copy.stat().st_mtime_ns
    assert open_source(SourceSettings(path), str(tmp_path)).fingerprint == first.fingerprint
    assert copy.stat().st_mtime_ns == before
    bucket.pipe("/set/data/test-00000-of-00001.jsonl", json.dumps(chat_row(None)).encode())
    changed = open_source(SourceSettings(path), str(tmp_path))
    assert changed.fingerprint != first.fingerprint
    assert changed.rows[0] == chat_row(None)


def test_a_remote_shard_and_compressed_lines(bucket, tmp_path):
    import gzip

    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name, data in (("0.json", json.dumps(chat_row("0.png")).encode()), ("0.png", PNG)):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    bucket.pipe("/shards/train-0.tar", packed.getvalue())
    bucket.pipe("/set/d.jsonl.gz", gzip.compress(json.dumps(ROWS[0]).encode()))
    shard = open_source(SourceSettings("memory://shards"), str(tmp_path))
    assert parse_record(shard.rows[0]).images == [ImageRef(PNG)]
    assert open_source(SourceSettings("memory://set/d.jsonl.gz"), str(tmp_path)).rows[0] == ROWS[0]


def test_images_stay_below_the_root(bucket):
    folder = RemoteFolder("memory://set")
    assert folder.read("img/a.png", len(PNG)) == PNG
    assert folder.read("./img/a.png", len(PNG)) == PNG
    expected = {
        "../other/b.png": "outside_root",
        "img/../../other/b.png": "outside_root",
        "/other/b.png": "outside_root",
        "../setting/a.png": "outside_root",
        "..\\other\\b.png": "outside_root",
        "memory://other/b.png": "outside_root",
        "zip://a.png::memory://x.zip": "outside_root",
        ".": "outside_root",
        "a\0.png": "outside_root",
        "img/gone.png": "missing_file",
        "img": "missing_file",
    }
    for name, reason in expected.items():
        with pytest.raises(RecordError) as caught:
            folder.read(name, 10**6)
        assert caught.value.reason == reason, name
    with pytest.raises(RecordError) as caught:
        folder.read("img/a.png", len(PNG) - 1)
    assert caught.value.reason == "file_too_large"
    bucket.pipe("/set/img/a.png", b"")
    with pytest.raises(RecordError) as caught:
        folder.read("img/a.png", 10)
    assert caught.value.reason == "empty_file"
    assert folder.describe("img/a.png") != folder.describe("img/b.png")


def test_a_remote_source_is_indexed(bucket, tmp_path, toy_folder):
    prepare = PrepareSettings(str(toy_folder), PruneSettings(), ResizeSettings())
    index = build_index([SourceSettings("memory://set")], prepare, index_dir=str(tmp_path))
    assert len(index) == 1
    assert [entry.reason for entry in index.quarantined] == ["outside_root", "missing_file"]
    bucket.pipe("/set/img/gone.png", PNG)
    again = build_index([SourceSettings("memory://set")], prepare, index_dir=str(tmp_path))
    assert len(again) == 2, "what was missing is looked for again"
    assert again.files == index.files


SECRET = "s3cr3t"


@pytest.mark.parametrize(
    "path",
    [
        f"s3://key:{SECRET}@bucket/d.jsonl",
        f"https://example.org/d.jsonl?token={SECRET}",
        f"s3://bucket/d.jsonl?X-Amz-Signature={SECRET}",
        f"hf://{SECRET}@datasets/o/n/d.jsonl",
        "zip://d.jsonl::s3://bucket/d.zip",
        "simplecache::s3://bucket/d.jsonl",
        "file:///etc/passwd",
        "ftp://host/d.jsonl",
        "s3://bucket/../other/d.jsonl",
    ],
)
def test_addresses_that_are_not_read_are_refused_before_anything_is_asked(path, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    for key in ("path", "root"):
        with pytest.raises(ValueError, match=rf"^{key}: an? ") as caught:
            SourceSettings(**{"path": "d.jsonl", key: path})
        assert SECRET not in str(caught.value)
    with pytest.raises(Exception, match="address") as caught:
        load_recipe("configs/debug.yaml", [f"data.sources.0.path={path}"])
    assert SECRET not in str(caught.value)
    assert SECRET not in caplog.text


def test_what_cannot_be_reached_is_said_in_one_line(bucket, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"memory://set/none\.jsonl: no such file or folder"):
        open_source(SourceSettings("memory://set/none.jsonl"), str(tmp_path))
    with pytest.raises(ValueError, match=r"memory://other: no \.jsonl"):
        open_source(SourceSettings("memory://other"), str(tmp_path))
    with pytest.raises(ValueError, match=r"\.png suffix"):
        open_source(SourceSettings("memory://set/img/a.png"), str(tmp_path))

    def broken(*args, **kwargs):
        raise PermissionError(f"403 for https://host/?sig={SECRET}")

    monkeypatch.setattr(type(bucket), "info", broken)
    with pytest.raises(ValueError, match=r"cannot be reached \(PermissionError\)") as caught:
        open_source(SourceSettings("memory://set"), str(tmp_path))
    assert SECRET not in str(caught.value)
