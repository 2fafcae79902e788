"""Processes that measure records: what hangs or dies costs a record, and the loader never meets it."""

import dataclasses
import io
import json
import logging
import os
import signal

import numpy as np
import pytest
from PIL import Image

from pixelprune.pack import VisionGeometry
from pixelprune.records.prepare import PrepareSettings
from pixelprune.settings import PruneSettings, ResizeSettings
from tests.samples import chat_row, write_jsonl
from tests.training.data import hostile_measures
from training.composition.toy import build_tokenizer, toy_config
from training.data import index_builder
from training.data.index_builder import build_index
from training.data.loader import LoaderSettings, PackLoader
from training.data.measuring import pool as measuring
from training.data.plan import PlanSettings
from training.data.settings import SourceSettings

LIMIT = 600.0
"""Seconds that no record of a test takes; the clock jumps where one hangs."""


@pytest.fixture
def prepare(model_folder) -> PrepareSettings:
    return PrepareSettings(str(model_folder), PruneSettings(), ResizeSettings(min_pixels=32 * 32))


def build(folder, prepare, measure=None, monkeypatch=None, **options):
    options = {"num_workers": 1, "show_progress": False, "max_seconds": LIMIT} | options
    sources = [SourceSettings(str(folder / "train.jsonl"))]
    if measure is None:
        return build_index(sources, prepare, **options)
    with monkeypatch.context() as patched:
        patched.setattr(index_builder, "row_steps", measure)
        return build_index(sources, prepare, **options)


@pytest.fixture
def jumping_clock(screens, monkeypatch):
    """More than the limit goes by whenever a record hangs, a few looks after it began to, and no time else."""
    looks = {}

    def now() -> float:
        for file in screens.glob("hangs-*"):
            looks[file] = looks.get(file, 0) + 1
        return 2 * LIMIT * sum(count > 5 for count in looks.values())

    monkeypatch.setattr(measuring, "_now", now)


def reasons(index) -> dict[str, str]:
    return {entry.record: entry.reason for entry in index.quarantined}


RANGE = "{%- for i in range(99999) -%}"
LOOPING = "{%- if 'loop' in messages[0].content | string -%}" + 3 * RANGE + 3 * "{%- endfor -%}" + "{%- endif -%}"


def jpeg_of_many_scans(num: int) -> bytes:
    """A progressive JPEG whose last scan comes again and again: small as a file, half a minute to decode."""
    file = io.BytesIO()
    Image.new("RGB", (4000, 4000), (90, 120, 200)).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    scan = data.rindex(b"\xff\xda")
    return data[:scan] + data[scan:-2] * num + data[-2:]


def test_a_jpeg_of_3000_scans_and_a_template_of_nested_ranges_cost_their_records(
    screens, prepare, tmp_path_factory, monkeypatch, jumping_clock, caplog, cost
):
    """Decoders in C and templates in a sandbox hear no signal: their process is ended, and another one goes on."""
    model = tmp_path_factory.mktemp("model")
    tokenizer = build_tokenizer()
    tokenizer.chat_template = LOOPING + tokenizer.chat_template
    tokenizer.save_pretrained(model)
    toy_config(tokenizer).save_pretrained(model)
    prepare = dataclasses.replace(prepare, model_path=str(model))
    fresh = build(screens, prepare, num_workers=0, index_dir=str(screens / "fresh"))
    (screens / "screen_3.png").write_bytes(jpeg_of_many_scans(3000))
    rows = [json.loads(line) for line in (screens / "train.jsonl").read_text().splitlines()]
    write_jsonl(screens / "train.jsonl", [*rows[:5], chat_row(None, "loop"), *rows[6:]])
    monkeypatch.setattr(measuring, "POLL_SECONDS", 0.05)
    index = build(screens, prepare, hostile_measures.tells_before_3_and_5, monkeypatch)
    assert reasons(index) == {"train:3": "too_slow", "train:5": "too_slow"}
    assert all("data.max_seconds_per_record=600" in entry.detail for entry in index.quarantined)
    assert len(index) == 22
    assert index.row.tolist() == [row for row in range(24) if row not in (3, 5)]
    assert caplog.text.count("its process replaced") == 2
    for name in ("content_hash", "num_supervised", "text_tokens"):
        np.testing.assert_array_equal(np.delete(getattr(fresh, name), [3, 5]), getattr(index, name))

    plan = PlanSettings(samples_per_step=8, pack_tokens=1000, pack_patches=10_000)
    geometry = VisionGeometry.from_config(toy_config(tokenizer))
    loader = PackLoader(index, index.plan_input(cost), plan, prepare, geometry, LoaderSettings())
    loaded = {record for batch in loader for record in batch.record_ids}
    assert not loaded & {"train:3", "train:5"}
    assert len(loaded - {"dummy"}) == 22


def test_what_was_too_slow_is_measured_again_under_another_limit(screens, prepare, monkeypatch, jumping_clock):
    build(screens, prepare, hostile_measures.hangs_at_3_and_5, monkeypatch)
    for file in screens.glob("hangs-*"):
        file.unlink()
    same = build(screens, prepare, hostile_measures.counts, monkeypatch)
    assert len(same) == 22
    assert not list(screens.glob("measured-*")), "measured again under the same limit"
    assert len(build(screens, prepare, max_seconds=0.0)) == 22, "without a limit nothing is known"
    assert len(build(screens, prepare, num_workers=0)) == 22, "this process could hang"
    again = build(screens, prepare, hostile_measures.counts, monkeypatch, max_seconds=LIMIT + 1)
    assert len(again) == 24
    assert sorted(file.name.rpartition("-")[2] for file in screens.glob("measured-*")) == ["3", "5"]


def test_a_process_that_dies_is_replaced(screens, prepare, monkeypatch, caplog):
    index = build(screens, prepare, hostile_measures.dies, monkeypatch, num_workers=2)
    assert reasons(index) == {"train:4": "unexpected"}
    (entry,) = index.quarantined
    assert "signal 9 (SIGKILL)" in entry.detail
    assert caplog.text.count("died (signal 9 (SIGKILL)) and is replaced") == 2
    # What nobody expected is tried again at the next start.
    assert len(build(screens, prepare)) == 24


def test_many_processes_measure_what_one_does(screens, prepare, monkeypatch):
    monkeypatch.setattr(index_builder, "CHUNK_ROWS", 5)
    here = build(screens, prepare, num_workers=0, index_dir=str(screens / "here"))
    there = build(screens, prepare, num_workers=2, index_dir=str(screens / "there"))
    for name in ("row", "content_hash", "num_supervised", "text_tokens", "kept_blocks", "full_blocks"):
        np.testing.assert_array_equal(getattr(here, name), getattr(there, name))
    assert not list(screens.rglob("part-*"))


def cannot_start(*_):
    raise SystemExit(7)


def is_killed(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def test_processes_that_cannot_start_say_so(screens, prepare, monkeypatch):
    monkeypatch.setattr(index_builder, "_start_worker", is_killed)
    with pytest.raises(ValueError, match=r"could not start: signal 9.*memory is short.*data\.index_workers=1"):
        build(screens, prepare)
    monkeypatch.setattr(index_builder, "_start_worker", cannot_start)
    with pytest.raises(ValueError, match=r"could not start: exit code 7.*__main__"):
        build(screens, prepare)


def test_without_processes_no_time_is_limited_which_is_said(screens, prepare, caplog):
    with caplog.at_level(logging.WARNING):
        build(screens, prepare, num_workers=0)
    assert "cannot end one that takes longer than data.max_seconds_per_record=600" in caplog.text
