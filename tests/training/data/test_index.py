"""The index against counts taken by hand, its reuse, its resume, and its quarantine."""

import dataclasses
import errno
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import ExifTags, Image

from pixelprune.images.image import prune_image
from pixelprune.records.limits import RecordLimits
from pixelprune.records.prepare import PrepareSettings
from pixelprune.settings import PruneSettings, ResizeSettings
from tests.samples import chat_row, draw_screen, encode, write_jsonl
from training.data import index_builder
from training.data.index_builder import build_index
from training.data.quarantine import count_reasons, read_quarantine
from training.data.settings import DataSettings, SourceSettings
from training.errors import StopAskedError


@pytest.fixture
def prepare(model_folder) -> PrepareSettings:
    return PrepareSettings(str(model_folder), PruneSettings(), ResizeSettings(min_pixels=32 * 32))


def build(folder: Path, prepare, **options):
    options = {"num_workers": 0, "show_progress": False} | options
    return build_index([SourceSettings(str(folder / "train.jsonl"))], prepare, **options)


@pytest.fixture
def measured(monkeypatch):
    """Rows measured so far."""
    rows = []
    original = index_builder.row_steps
    monkeypatch.setattr(index_builder, "row_steps", lambda *args: (rows.append(args[2]), original(*args))[1])
    return rows


def on_ranks(world_size: int, work) -> list:
    """What each rank's call of work(rank=, world_size=, barrier=) returned or raised; ranks are threads."""
    barrier = threading.Barrier(world_size, timeout=60)

    def one_rank(rank: int):
        try:
            return work(rank=rank, world_size=world_size, barrier=barrier.wait)
        except (ValueError, OSError) as error:
            return error

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(one_rank, range(world_size)))


def read_only(monkeypatch, folder: Path) -> None:
    """Refuse writes below the folder, as a mount does (permissions do not stop root)."""
    refused = OSError(errno.EROFS, "Read-only file system", str(folder))
    writers = {"replace": os.replace, "mkdir": os.mkdir}

    for name, original in writers.items():

        def guarded(path, *args, original=original, **kwargs):
            if Path(path).is_relative_to(folder):
                raise refused
            return original(path, *args, **kwargs)

        monkeypatch.setattr(os, name, guarded)


def test_columns_that_nobody_reads_are_named_once_before_anything_is_measured(tmp_path, prepare, measured):
    messages = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "There."}]
    row = {"messages": messages, "mood": "good", "rate": 0.5, "empty": "", "none": None, "tools": []}
    datasets.Dataset.from_list([row | {"id": i} for i in range(3)]).to_parquet(tmp_path / "d.parquet")
    sources = [SourceSettings(str(tmp_path / "d.parquet"))]
    with pytest.raises(ValueError, match=r"columns that are not read: mood, rate; .* data\.ignore_keys"):
        build_index(sources, prepare, show_progress=False)
    assert not measured
    named = dataclasses.replace(prepare, ignore_keys=("mood", "rate"))
    assert len(build_index(sources, named, show_progress=False)) == 3


def test_what_is_ignored_is_part_of_what_an_index_stands_for(tmp_path, prepare, measured):
    write_jsonl(tmp_path / "train.jsonl", [chat_row(None) | {"mood": "good"}, chat_row(None)])
    assert count_reasons(build(tmp_path, prepare).quarantined) == {"unread_key": 1}
    assert len(build(tmp_path, dataclasses.replace(prepare, ignore_keys=("mood",)))) == 2
    assert len(measured) == 4


@pytest.mark.parametrize("asked_here", [True, False])
def test_a_stop_ends_the_index_after_a_chunk_on_all_ranks(screens, prepare, measured, monkeypatch, asked_here):
    """Also a stop that only another rank has met; what was measured is found again."""
    monkeypatch.setattr(index_builder, "CHUNK_ROWS", 8)
    votes: list[bool] = []

    def any_rank(flag: bool) -> bool:
        votes.append(flag)
        return True

    with pytest.raises(StopAskedError):
        build(screens, prepare, is_stopped=lambda: asked_here, any_rank=any_rank)
    assert votes == [asked_here]
    assert len(measured) == (8 if asked_here else 24)
    assert len(build(screens, prepare)) == 24
    assert sorted(measured) == list(range(24))


def test_counts_are_those_of_the_images_and_the_text(screens, prepare, tokenizer):
    index = build(screens, prepare)
    assert len(index) == index.num_records == 24
    for i in range(24):
        path = screens / f"screen_{i}.png"
        kept = full = 0
        if path.exists():
            selection = prune_image(path, prepare.prune, prepare.resize).selection
            kept, full = int(selection.keep.sum()), selection.keep.size
            assert 0 < kept < full
        assert (index.num_kept[i], index.num_full[i]) == (kept, full)
        row = index.sources[0].rows[i]
        question, answer = row["messages"][0]["content"][-1]["text"], row["messages"][1]["content"]
        image = "<|vision_start|><|image_pad|><|vision_end|>" if path.exists() else ""
        text = f"<|im_start|>user\n{image}{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
        assert index.text_tokens[i] == len(tokenizer(text)["input_ids"]) - path.exists()
        assert index.num_supervised[i] == len(tokenizer(answer + "<|im_end|>")["input_ids"])
    assert index.retain_ratio == pytest.approx(index.num_kept.sum() / index.num_full.sum())


def test_plan_columns_are_those_of_each_record(screens, prepare, cost):
    """One record with two images, one with one, one with none; costs taken record by record."""
    rows = [chat_row("screen_0.png"), chat_row("screen_1.png"), chat_row(None)]
    rows[0]["messages"][0]["content"].insert(0, {"type": "image", "image": "screen_3.png"})
    write_jsonl(screens / "train.jsonl", rows)
    index = build(screens, prepare)

    def kept(name):
        return prune_image(screens / name, prepare.prune, prepare.resize).selection.num_kept

    blocks = [[kept("screen_3.png"), kept("screen_0.png")], [kept("screen_1.png")], []]
    full = [[24, 80], [24], []]
    for with_teacher in (False, True):
        inputs = index.plan_input(cost, with_teacher=with_teacher)
        for i in range(3):
            counted = {"text_tokens": int(index.text_tokens[i]), "supervised_tokens": int(index.num_supervised[i])}
            expected = cost.sample_flops(kept_blocks=blocks[i], training=True, **counted)
            capped = blocks[i]
            if with_teacher:
                expected += cost.sample_flops(kept_blocks=full[i], training=False, **counted)
                capped = full[i]
            assert inputs.cost[i] == pytest.approx(expected)
            assert inputs.tokens[i] == counted["text_tokens"] + sum(capped)
            assert inputs.patches[i] == 4 * sum(capped)


def test_workers_and_ranks_give_the_same_index(screens, prepare, monkeypatch, tmp_path):
    monkeypatch.setattr(index_builder, "CHUNK_ROWS", 5)
    alone = build(screens, prepare, index_dir=str(tmp_path / "alone"))
    pooled = build(screens, prepare, index_dir=str(tmp_path / "pool"), num_workers=2)
    ranks = on_ranks(3, lambda **group: build(screens, prepare, index_dir=str(tmp_path / "ranks"), **group))
    for other in (pooled, *ranks):
        assert other.content_hash.tolist() == alone.content_hash.tolist()
        assert other.text_tokens.tolist() == alone.text_tokens.tolist()
        assert other.kept_blocks.tolist() == alone.kept_blocks.tolist()
        assert other.image_starts.tolist() == alone.image_starts.tolist()
    assert not list((tmp_path / "ranks").rglob("part-*")), "parts are gone once joined"


def test_reused_until_something_it_depends_on_changes(screens, prepare, measured):
    build(screens, prepare)
    assert len(measured) == 24
    build(screens, prepare)
    assert len(measured) == 24
    changes = [
        dataclasses.replace(prepare, prune=PruneSettings(threshold=0.1)),
        dataclasses.replace(prepare, resize=ResizeSettings(min_pixels=64 * 64)),
        dataclasses.replace(prepare, last_turn_only=True),
    ]
    for number, changed in enumerate(changes, start=1):
        build(screens, changed)
        assert len(measured) == 24 + 24 * number
    path = screens / "train.jsonl"
    path.write_text(path.read_text() + path.read_text().splitlines()[0] + "\n")
    build(screens, prepare)
    assert len(measured) == 24 * 4 + 25
    os.utime(path, ns=(1, 1))
    build(screens, prepare)
    assert len(measured) == 24 * 4 + 50


def test_rebuilt_for_another_tokenizer(screens, prepare, measured, tokenizer, model_folder, tmp_path):
    import shutil

    other = tmp_path / "other"
    shutil.copytree(model_folder, other)
    build(screens, prepare)
    build(screens, dataclasses.replace(prepare, model_path=str(other)))
    assert len(measured) == 24, "an equal tokenizer in another folder is the same"
    template = other / "chat_template.jinja"
    template.write_text(template.read_text() + "{# changed #}")
    build(screens, dataclasses.replace(prepare, model_path=str(other)))
    assert len(measured) == 48


def test_a_killed_build_goes_on_where_it_was(screens, prepare, monkeypatch, measured):
    monkeypatch.setattr(index_builder, "CHUNK_ROWS", 4)
    original = index_builder.row_steps

    def dies_at_13(preparer, source, row, pictures):
        if row == 13:
            raise KeyboardInterrupt
        return original(preparer, source, row, pictures)

    monkeypatch.setattr(index_builder, "row_steps", dies_at_13)
    with pytest.raises(KeyboardInterrupt):
        build(screens, prepare)
    monkeypatch.setattr(index_builder, "row_steps", original)
    measured.clear()
    assert len(build(screens, prepare)) == 24
    assert measured == list(range(12, 24)), "three whole parts of four rows were kept"


@pytest.mark.parametrize(("error", "reason"), [(RuntimeError, "unexpected"), (MemoryError, "out_of_memory")])
def test_what_may_not_be_the_records_fault_costs_it_until_it_is_gone(
    error, reason, screens, prepare, monkeypatch, measured
):
    def broken(*args, **kwargs):
        raise error("bug")

    write_jsonl(screens / "train.jsonl", [chat_row("screen_0.png"), chat_row(None)])
    with monkeypatch.context() as patched:
        patched.setattr("pixelprune.records.prepare.prune_shots", broken)
        index = build(screens, prepare)
    (lost,) = index.quarantined
    assert len(index) == 1
    assert (lost.record, lost.reason) == ("train:0", reason)
    assert lost.file.endswith("train.jsonl, record 1")
    assert lost.detail.startswith(f"{error.__name__}: bug (test_index.py:")
    measured.clear()
    again = build(screens, prepare)
    assert (len(again), again.quarantined, measured) == (2, [], [0])


def test_quarantine_adds_up_and_is_written(screens, prepare, tmp_path):
    good = [chat_row("screen_0.png"), chat_row(None), chat_row("screen_1.png")]
    bad = ["{broken", chat_row("none.png"), chat_row("../x.png"), {"messages": []}]
    write_jsonl(screens / "train.jsonl", [*good, *bad])
    index = build(screens, prepare)
    assert (len(index), index.num_records) == (3, 7)
    reasons = {"invalid_json": 1, "missing_file": 1, "outside_root": 1, "empty_conversation": 1}
    assert count_reasons(index.quarantined) == reasons
    sidecar = next(screens.rglob("quarantine.jsonl"))
    assert read_quarantine(sidecar) == index.quarantined
    assert index.quarantined[0].file.endswith("train.jsonl, record 4")
    assert index.summary()["num_kept"] + index.summary()["num_quarantined"] == 7
    settings = DataSettings(max_quarantined_share=0.5)
    with pytest.raises(ValueError, match=r"4 of 7 records cannot be used .*data\.max_quarantined_share.*\.index"):
        index.checked(settings, tmp_path / "q.jsonl")
    settings.max_quarantined_share = 0.6
    assert len(index.checked(settings, tmp_path / "q.jsonl")) == 3
    assert read_quarantine(tmp_path / "q.jsonl") == index.quarantined


def break_images(folder: Path) -> list[dict]:
    """Every way in which an image file can be unusable, each in a record of its own."""
    good = (folder / "screen_0.png").read_bytes()
    files = {
        "empty.png": b"", "text.png": b"no image", "half.png": good[: len(good) // 2],
        "long.png": encode(Image.new("RGB", (8200, 40))), "bomb.png": encode(Image.new("L", (600, 600))),
        "float.tiff": encode(Image.new("F", (64, 64)), "TIFF"), "huge.png": good + bytes(200_000),
        "small.png": encode(draw_screen(1, 64, 64)),
    }  # fmt: skip
    for name, data in files.items():
        (folder / name).write_bytes(data)
    (folder / "folder.png").mkdir()
    (folder / "link.png").symlink_to("/etc/hostname")
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 3
    draw_screen(1).save(folder / "turned.jpg", exif=turned)
    rows = [chat_row(name, answer=name) for name in (*files, "folder.png", "link.png", "missing.png", "turned.jpg")]
    for row in rows:
        name = row["messages"][1]["content"]
        if name in ("small.png", "turned.jpg"):
            row["messages"][1]["content"] = f"{name} <bbox>"
            row["objects"] = {"bbox": [[0, 0, 150, 100]]}
    return rows


def test_a_fixed_image_is_used_by_the_next_run(screens, prepare, measured, caplog):
    broken = break_images(screens)
    embedded = chat_row("data:image/png;base64,AAAA")
    write_jsonl(screens / "train.jsonl", [chat_row("screen_0.png"), *broken, embedded, "{no json", chat_row(None)])
    limited = dataclasses.replace(
        prepare,
        resize=ResizeSettings(min_pixels=1024, max_decoded_pixels=350_000),
        limits=RecordLimits(max_file_bytes=200_000),
    )
    index = build(screens, limited)
    reasons = count_reasons(index.quarantined)
    assert set(reasons) - {"invalid_json"} == set(index_builder.REPAIRABLE), "each reason is tried here"
    assert len(index) == 2

    measured.clear()
    assert build(screens, limited).quarantined == index.quarantined
    assert measured == list(range(1, 13)), "nothing but records with image files is looked at again"
    table = next(screens.rglob("index.parquet"))
    written = table.stat().st_mtime_ns
    build(screens, limited, recheck=False)
    assert len(measured) == 12
    assert table.stat().st_mtime_ns == written, "rewritten only for a change"

    (screens / "folder.png").rmdir()
    (screens / "link.png").unlink()
    for row in broken:
        name = row["messages"][0]["content"][0]["image"]
        (screens / name).write_bytes((screens / "screen_1.png").read_bytes())
    measured.clear()
    with caplog.at_level("WARNING"):
        fixed = build(screens, limited, recheck=True)
    assert "12 records whose images were fixed" in caplog.text
    assert len(fixed) == 14
    assert [entry.record for entry in fixed.quarantined] == ["train:13", "train:14"]
    fresh = build(screens, limited, index_dir=str(screens / "fresh"))
    assert fresh.quarantined == fixed.quarantined == read_quarantine(table.with_name("quarantine.jsonl"))
    for name in ("row", "content_hash", "text_tokens", "num_supervised", "kept_blocks", "full_blocks", "image_starts"):
        np.testing.assert_array_equal(getattr(fixed, name), getattr(fresh, name))
    measured.clear()
    build(screens, limited)
    assert measured == []


def test_a_fix_is_measured_by_processes_and_seen_by_all_ranks(screens, prepare, monkeypatch):
    monkeypatch.setattr(index_builder, "CHUNK_ROWS", 3)
    write_jsonl(screens / "train.jsonl", [chat_row(f"late_{i}.png", answer=str(i)) for i in range(8)])
    assert len(build(screens, prepare)) == 0
    for i in range(0, 8, 2):
        (screens / f"late_{i}.png").write_bytes((screens / "screen_0.png").read_bytes())
    ranks = on_ranks(2, lambda **group: build(screens, prepare, num_workers=2, **group))
    assert [index.row.tolist() for index in ranks] == [[0, 2, 4, 6]] * 2


def test_an_index_on_a_read_only_file_system_is_used(screens, prepare, monkeypatch, caplog):
    """Written nowhere while nothing changed; what could not be written down stays out, on every rank alike."""
    write_jsonl(screens / "train.jsonl", [chat_row("screen_0.png"), chat_row("late.png")])
    build(screens, prepare)
    read_only(monkeypatch, screens / "train.jsonl.index")
    assert len(build(screens, prepare)) == 1
    (screens / "late.png").write_bytes((screens / "screen_1.png").read_bytes())
    assert len(build(screens, prepare)) == 1
    assert "1 records that can be used now stay out" in caplog.text


def test_what_is_trained_on_is_part_of_a_records_content(screens, prepare):
    """Else an answer that is no longer trained on would change the count of a step unnoticed."""
    rows = [chat_row("screen_0.png"), chat_row("screen_0.png"), chat_row("screen_0.png")]
    turns = [{"role": "user", "content": "And?"}, {"role": "assistant", "content": "So."}]
    for row, more in zip(rows, ({}, {"loss": True}, {"loss": False}), strict=True):
        row["messages"] = [*row["messages"], turns[0], turns[1] | more]
    write_jsonl(screens / "train.jsonl", rows)
    index = build(screens, prepare)
    first, same, other = index.content_hash.tolist()
    assert first == same != other
    assert index.num_supervised[0] == index.num_supervised[1] > index.num_supervised[2]


def test_sources_of_one_name_size_and_time_have_their_own_index(screens, prepare, tmp_path):
    """Two folders, equal data files, other images: kept together in one index_dir."""
    for name, seed in (("a", 1), ("b", 2)):
        folder = tmp_path / name
        folder.mkdir()
        write_jsonl(folder / "train.jsonl", [chat_row("x.png")])
        os.utime(folder / "train.jsonl", ns=(5, 5))
        draw_screen(seed).save(folder / "x.png")
    together = {"index_dir": str(tmp_path / "all")}
    alone = [build(tmp_path / name, prepare).content_hash.tolist() for name in "ab"]
    assert [build(tmp_path / name, prepare, **together).content_hash.tolist() for name in "ab"] == alone
    # One data file over two roots; and one root written in two ways is one.
    source = str(tmp_path / "a" / "train.jsonl")
    roots = [tmp_path / "a", tmp_path / "b", tmp_path / "b" / ".." / "b"]
    found = [
        build_index([SourceSettings(source, root=str(root))], prepare, num_workers=0, show_progress=False, **together)
        for root in roots
    ]
    assert [index.content_hash.tolist() for index in found] == [alone[0], alone[1], alone[1]]
    assert found[1].files == found[2].files


def test_a_source_with_nothing_usable_is_refused(screens, prepare, tmp_path):
    write_jsonl(screens / "train.jsonl", [chat_row("none.png")] * 5)
    with pytest.raises(ValueError, match="5 of 5 records cannot be used"):
        build(screens, prepare).checked(DataSettings(max_quarantined_share=1.0), tmp_path / "q.jsonl")


def test_over_long_after_pruning(screens, prepare, tmp_path, cost):
    """A flat screen fits after pruning; a noisy one of its size does not; paired, neither does."""
    Image.new("RGB", (640, 640), "white").save(screens / "flat.png")
    noise = np.random.default_rng(0).integers(0, 255, (640, 640, 3), dtype=np.uint8)
    Image.fromarray(noise).save(screens / "noise.png")
    write_jsonl(screens / "train.jsonl", [chat_row("flat.png"), chat_row("noise.png"), chat_row(None)])
    index = build(screens, prepare)
    settings = DataSettings(pack_tokens=300, max_quarantined_share=0.7)
    kept = index.checked(settings, tmp_path / "q.jsonl")
    assert [kept.record_id(i) for i in range(len(kept))] == ["train:0", "train:2"]
    (entry,) = read_quarantine(tmp_path / "q.jsonl")
    assert (entry.record, entry.reason) == ("train:1", "over_long")
    assert "data.pack_tokens=300" in entry.detail
    settings.paired = True
    assert len(index.checked(settings, tmp_path / "q.jsonl")) == 1
    settings = DataSettings(pack_patches=1000, max_quarantined_share=0.7)
    assert len(index.checked(settings, tmp_path / "q.jsonl")) == 2
    assert len(index.checked(DataSettings(pack_tokens=300, max_quarantined_share=0.7), tmp_path / "q.jsonl")) == 2
    assert len(index.without_over_long(DataSettings(pack_tokens=300), with_teacher=True)) == 1
    assert index.subset(np.array([False, True, False]), []).plan_input(cost).patches.tolist() == [1600]


def test_sources_have_weights_and_records_too(screens, prepare, cost):
    write_jsonl(screens / "a.jsonl", [chat_row(None) | {"weight": 0.5}, chat_row(None)])
    write_jsonl(screens / "b.jsonl", [chat_row(None)])
    sources = [SourceSettings(str(screens / "a.jsonl"), weight=3), SourceSettings(str(screens / "b.jsonl"), weight=0.2)]
    index = build_index(sources, prepare, num_workers=0, show_progress=False)
    inputs = index.plan_input(cost)
    assert inputs.copies.tolist() == [1.5, 3.0, 0.2]
    assert inputs.source.tolist() == [0, 0, 1]
    assert [index.record_id(i) for i in range(3)] == ["a:0", "a:1", "b:0"]


def test_folder_that_cannot_be_written_names_the_knob(screens, prepare):
    (screens / "file").write_text("")
    with pytest.raises(ValueError, match=r"data\.index_dir"):
        build(screens, prepare, index_dir=str(screens / "file"))


@pytest.mark.parametrize("blind_rank", [0, 1])
def test_a_source_that_another_run_completes_meanwhile_disturbs_no_rank(screens, prepare, monkeypatch, blind_rank):
    """One rank finds the first of two sources still missing, the other finds it complete already."""
    monkeypatch.setattr(index_builder, "CHUNK_ROWS", 5)
    names = [str(screens / f"{name}.jsonl") for name in "ab"]
    for name in names:
        Path(name).write_bytes((screens / "train.jsonl").read_bytes())
    sources = [SourceSettings(name) for name in names]
    complete = build_index(sources[:1], prepare, num_workers=0, show_progress=False).files
    blind, exists = set(), Path.exists

    def not_yet(path):
        return exists(path) and not (path in complete and threading.get_ident() in blind)

    monkeypatch.setattr(Path, "exists", not_yet)

    def work(rank, barrier, **group):
        me = threading.get_ident()
        if rank == blind_rank:
            blind.add(me)

        def wait():
            blind.discard(me)
            barrier()

        return build_index(sources, prepare, num_workers=0, show_progress=False, rank=rank, barrier=wait, **group)

    assert [getattr(index, "num_records", index) for index in on_ranks(2, work)] == [48, 48]


def test_ranks_without_a_shared_folder_are_told(screens, prepare, monkeypatch, tmp_path):
    """All of them, none waiting for another."""
    monkeypatch.setattr(index_builder, "CHUNK_ROWS", 5)

    def work(rank, **group):
        return build(screens, prepare, index_dir=str(tmp_path / f"disk of {rank}"), rank=rank, **group)

    for error in on_ranks(2, work):
        assert "file system that all ranks share" in str(error)


def test_a_failure_of_rank_0_leaves_no_rank_waiting(screens, prepare, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(index_builder, "_write_index", full)
    failed, told = on_ranks(2, lambda **group: build(screens, prepare, **group))
    assert failed.errno == errno.ENOSPC
    assert "file system that all ranks share" in str(told)
