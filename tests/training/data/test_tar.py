"""A WebDataset shard gives the records of the same JSON lines, read by offset; what is no plain file is refused."""

import io
import json
import os
import pickle
import tarfile

import pytest

from pixelprune.records.keys import KeyRules
from pixelprune.records.prepare import PrepareSettings
from pixelprune.records.reader import parse_record
from pixelprune.records.record import ImageRef, RecordError
from pixelprune.settings import PruneSettings, ResizeSettings
from tests.samples import chat_row, draw_screen, encode, write_jsonl
from training.data.files import json_rows
from training.data.measuring.row import measure_row
from training.data.settings import SourceSettings
from training.data.sources import open_source
from training.errors import UserError

PNG, JPG = encode(draw_screen(1)), encode(draw_screen(2), "JPEG")
TURNS = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "a"}]
UNNAMED = {"conversations": TURNS}
TEXT = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}
TWO = {"conversations": [{"from": "human", "value": "<image><image>"}, TURNS[1]]}


def add(archive, name, data=b"", **fields):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for key, value in fields.items():
        setattr(member, key, value)
    archive.addfile(member, io.BytesIO(data))


def write_tar(path, members, tar_format=tarfile.PAX_FORMAT):
    with tarfile.open(path, "w", format=tar_format) as archive:
        for name, data in members:
            add(archive, name, data if isinstance(data, bytes) else json.dumps(data).encode())
    return path


def rows_of(path):
    source = open_source(SourceSettings(str(path)))
    return [source.rows[i] for i in range(len(source))]


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_images_come_from_their_key_or_by_the_names_in_the_record(tar_format, tmp_path):
    long = "d" * 90 + "/" + "e" * 60 + "/000.x"
    members = [
        ("./a/0001.json", UNNAMED),
        ("a/0001.PNG", PNG),
        ("b/0001.jpg", JPG),  # another folder, another key; its image comes first
        ("b/0001.json", {"conversations": TURNS, "image": "b/0001.jpg"}),
        ("2.1.png", PNG),
        ("2.json", {**TWO, "images": ["2.0.jpg", "./2.1.png"]}),
        ("2.0.jpg", JPG),
        ("3.b.jpg", JPG),
        ("3.a.png", PNG),
        ("3.json", TWO),
        ("._3.json", b"of the archiver"),
        ("4.json", {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}),
        ("5.png", PNG),
        ("5.json", chat_row("5.png")),
        (f"{long}.png", PNG),
        (f"{long}.json".replace(".x", ""), UNNAMED),
    ]
    path = write_tar(tmp_path / "s.tar", members[:-2], tar_format)
    (tmp_path / "other").mkdir()
    source = open_source(SourceSettings(str(path)))
    records = [parse_record(source.rows[i]) for i in range(len(source))]
    images = [[image.source for image in record.images] for record in records]
    assert images == [[PNG], [JPG], [PNG, JPG][::-1], [JPG, PNG], [], [PNG]]
    again = pickle.loads(pickle.dumps(source))
    assert again.rows[4] == source.rows[4]
    assert source.rows.where(1) == f"{path}, b/0001"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["other", "s.tar"], "nothing is extracted"
    if tar_format != tarfile.USTAR_FORMAT:
        (row,) = rows_of(write_tar(tmp_path / "long.tar", members[-2:], tar_format))
        assert row == {**UNNAMED, "images": [PNG]}


def test_shards_of_a_split_are_one_source_and_measure_as_their_json_lines(tmp_path, toy_folder):
    for number, png in enumerate((PNG, encode(draw_screen(3)))):
        write_tar(tmp_path / f"train-{number:06d}.tar", [("0.json", UNNAMED), ("0.png", png)])
        (tmp_path / f"{number}.png").write_bytes(png)
    write_tar(tmp_path / "val-000000.tar", [("0.json", UNNAMED), ("0.png", JPG)])
    lines = write_jsonl(tmp_path / "d.jsonl", [{**UNNAMED, "images": [f"{number}.png"]} for number in range(2)])
    shards = tmp_path / "shards"
    shards.mkdir()
    for file in tmp_path.glob("*.tar"):
        file.rename(shards / file.name)
    preparer = PrepareSettings(str(toy_folder), PruneSettings(), ResizeSettings()).build()
    packed, plain = (open_source(SourceSettings(str(path))) for path in (shards, lines))
    assert len(packed) == 2
    for row in range(2):
        measured = measure_row(preparer, packed, row)
        assert measured == measure_row(preparer, plain, row)
        assert measured["kept_blocks"]


def refused(path, row=0):
    source = open_source(SourceSettings(str(path)))
    with pytest.raises(RecordError) as caught:
        parse_record(source.rows[row])
    return caught.value.reason


def test_a_member_that_is_no_plain_file_costs_its_record(tmp_path):
    (tmp_path / "secret.png").write_bytes(PNG)
    for kind, link in ((tarfile.SYMTYPE, "secret.png"), (tarfile.LNKTYPE, "1.png"), (tarfile.FIFOTYPE, "")):
        with tarfile.open(tmp_path / "s.tar", "w") as archive:
            add(archive, "1.json", json.dumps(UNNAMED).encode())
            add(archive, "1.png", PNG)
            add(archive, "2.json", json.dumps(UNNAMED).encode())
            add(archive, "2.png", type=kind, linkname=link)
        assert refused(tmp_path / "s.tar", 1) == "bad_member"
        source = open_source(SourceSettings(str(tmp_path / "s.tar")))
        assert parse_record(source.rows[0]).images == [ImageRef(PNG)]


def test_keys_that_are_no_record_are_refused_each_with_its_reason(tmp_path, monkeypatch):
    wrong = {
        "bad_member": [("a.png", PNG)],
        "invalid_json": [("a.json", b"{"), ("a.png", PNG)],
        "unread_key": [("a.json", UNNAMED), ("a.png", PNG), ("a.cls", b"3")],
        "image_count": [("a.json", {**UNNAMED, "image": "a.png"}), ("a.png", PNG), ("a.2.png", PNG)],
        "not_an_object": [("a.json", [1]), ("a.png", PNG)],
    }
    for reason, members in wrong.items():
        assert refused(write_tar(tmp_path / "s.tar", members)) == reason
    assert refused(write_tar(tmp_path / "s.tar", [("a.json", UNNAMED), ("a.png", PNG), ("a.png", JPG)])) == "bad_member"
    (row,) = rows_of(
        write_tar(tmp_path / "s.tar", [("a.json", {**UNNAMED, "cls": 1}), ("a.png", PNG), ("a.cls", b"3")])
    )
    with pytest.raises(RecordError, match="'cls'"):  # the JSON's own
        parse_record(row, rules=KeyRules.ignoring([".cls"]))
    parse_record(row, rules=KeyRules.ignoring(["cls", ".cls"]))
    (row,) = rows_of(write_tar(tmp_path / "s.tar", [(b"\xe4\xff.json".decode(errors="surrogateescape"), TEXT)]))
    assert row == TEXT
    monkeypatch.setattr(json_rows, "MAX_RECORD_BYTES", len(PNG) - 1)
    assert refused(write_tar(tmp_path / "s.tar", [("a.json", UNNAMED), ("a.png", PNG)])) == "record_too_large"


def test_a_shard_that_becomes_shorter_is_named(tmp_path):
    path = write_tar(tmp_path / "s.tar", [("a.json", UNNAMED), ("a.png", PNG)])
    source = open_source(SourceSettings(str(path)))
    os.truncate(path, 1024)
    with pytest.raises(UserError, match=r"s\.tar: the data file has become shorter"):
        source.rows[0]


def test_an_archive_that_is_none_is_named(tmp_path):
    whole = write_tar(tmp_path / "s.tar", [("a.json", UNNAMED), ("a.png", PNG)]).read_bytes()
    with tarfile.open(tmp_path / "z.tar", "w:gz") as archive:
        add(archive, "a.json", b"{}")
    wrong = {"cut.tar": whole[: len(PNG)], "no.tar": b"x" * 2000, "z.tar": (tmp_path / "z.tar").read_bytes()}
    for name, data in wrong.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=rf"{name}: damaged, or no uncompressed"):
            open_source(SourceSettings(str(tmp_path / name)))
    (tmp_path / "d.tar.gz").write_bytes(wrong["z.tar"])
    with pytest.raises(ValueError, match=r"d\.tar\.gz is compressed, .*unpack it to a \.tar first"):
        open_source(SourceSettings(str(tmp_path / "d.tar.gz")))
