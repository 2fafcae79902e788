"""metrics.jsonl after a resume and after a kill, and wandb that cannot reach its server."""

from __future__ import annotations

import json
import logging
import math
import resource
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image
from wandb.proto.wandb_internal_pb2 import Record

from training.config.recipe import config_to_dict, load_recipe
from training.config.settings import TrackingSettings
from training.errors import RankError, UserError
from training.tracking import wandb_mirror
from training.tracking.metrics import METRICS
from training.tracking.mirror import Mirror
from training.tracking.other_mirrors import check_installed
from training.tracking.tracker import Tracker, read_metrics, sheet_path
from training.tracking.wandb_mirror import sectioned

DISABLED = TrackingSettings(wandb="disabled")


def test_rows_after_the_restored_step_are_cut_off(tmp_path):
    rows = [{"step": step, "loss": 1.0 / step} for step in range(1, 6)] + [{"step": 3, "eval_loss": 0.5}]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 6, "lo')
    tracker = Tracker(tmp_path, DISABLED, "run", {}, restored_step=3)
    assert tracker.has_evaluation(3)
    assert not tracker.has_evaluation(5)
    tracker.log(4, {"loss": math.nan})
    tracker.close()
    assert [(row["step"], row.get("loss", "eval")) for row in read_metrics(tmp_path)] == [
        (1, 1.0),
        (2, 0.5),
        (3, 1 / 3),
        (3, "eval"),
        (4, None),
    ]


def test_a_new_run_keeps_no_old_rows(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n')
    Tracker(tmp_path, DISABLED, "run", {}).close()
    assert read_metrics(tmp_path) == []


@pytest.mark.parametrize("mode", ["online", "auto"])
def test_wandb_without_its_server_costs_no_row(tmp_path, monkeypatch, caplog, mode):
    monkeypatch.setattr(wandb_mirror, "_INIT_SECONDS", 3)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    with caplog.at_level(logging.INFO):
        tracker = Tracker(tmp_path, TrackingSettings(wandb=mode), "run", {"optim": {"lr": 1e-3}}, run_id="abc")
        for step in range(1, 4):
            tracker.log(step, {"loss": 1.0 / step})
        tracker.close()
    assert "online mode failed" in caplog.text
    assert "wandb: offline" in caplog.text
    assert len(read_metrics(tmp_path)) == 3
    assert list((tmp_path / "wandb").glob("offline-run-*-abc/run-abc.wandb"))


def records_of(path: Path) -> Iterator[Record]:
    """A .wandb file: wandb's own messages in the frames of a LevelDB log (blocks of 32 KiB; checksum, length, kind)."""
    data, position, whole = path.read_bytes(), 7, b""
    assert data.startswith(b":W&B")
    while position + 7 < len(data):
        if (left := -position % 32768) and left < 7:
            position += left
        _, length, kind = struct.unpack_from("<IHB", data, position)
        whole += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(whole)
            whole = b""


def whole_run(path: Path) -> list[Record]:
    """All of a run's records; wandb's service writes the last of them in its own time."""
    records, deadline = list(records_of(path)), time.monotonic() + 60
    while not any(record.HasField("exit") for record in records):
        assert time.monotonic() < deadline, "the run was never written whole"
        time.sleep(0.05)
        records = list(records_of(path))
    return records


def history_of(records: list[Record]) -> list[dict]:
    """Rows of the history; what is a file or a picture is a dict."""
    rows = []
    for record in records:
        if record.HasField("history"):
            row: dict = {}
            for item in record.history.item:
                *outer, last = item.nested_key
                place = row.setdefault(outer[0], {}) if outer else row
                place[last] = json.loads(item.value_json)
            rows.append(row)
    return rows


def track_evaluations(folder: Path, settings: TrackingSettings) -> None:
    """Three steps and two evaluations, of which the second has a picture of its answers."""
    tracker = Tracker(folder, settings, "run", {"optim": {"lr": 1e-3}, "tags": [1]}, run_id="abc")
    for step in (1, 2, 3):
        tracker.log(step, {"loss": 1.0 / step, "retain_ratio": 0.5})
        if step == 1:
            continue
        tracker.log(step, {"eval_loss": 1.0 / step})
        if step == 3:
            sheet_path(folder, 3).parent.mkdir()
            Image.new("RGB", (40, 30), (200, 10, 10)).save(sheet_path(folder, 3))
        tracker.log(step, {"eval_accuracy": step / 4})
        tracker.show_evaluations(step)
    tracker.close()


def test_the_table_of_evaluations_has_their_figures_and_pictures(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "staged"))
    track_evaluations(tmp_path, TrackingSettings(wandb="offline"))
    (path,) = (tmp_path / "wandb").glob("offline-run-*-abc/run-abc.wandb")
    records = whole_run(path)
    history = history_of(records)
    shown = [row["eval/table"] for row in history if "eval/table" in row]
    assert [(one["_type"], one["nrows"]) for one in shown] == [("table-file", 1), ("table-file", 2)]
    assert {row["eval/accuracy"] for row in history if "eval/accuracy" in row} == {0.5, 0.75}, "the charts stay"
    # What is uploaded, pictures with it, is an artifact; its files wait where wandb keeps its data.
    newest = [record.artifact for record in records if record.HasField("artifact")][-1]
    files = {entry.path: Path(entry.local_path) for entry in newest.manifest.contents}
    table = json.loads(files["eval/table.table.json"].read_text())
    assert table["columns"] == ["step", "loss", "accuracy", "misses and hits"]
    assert [row[:3] for row in table["data"]] == [[2, 0.5, 0.5], [3, 1 / 3, 0.75]]
    assert table["data"][0][3] is None
    with Image.open(files[table["data"][1][3]["path"]]) as picture:
        assert picture.size == (40, 30)
        assert picture.getpixel((5, 5)) == (200, 10, 10)


def test_tensorboard_has_the_same_sections_and_the_pictures(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed (pip install tensorboard)")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = TrackingSettings(wandb="disabled", also=["tensorboard"])
    check_installed(settings)
    track_evaluations(tmp_path, settings)
    # A resume after step 2 makes step 3 again.
    tracker = Tracker(tmp_path, settings, "run", {}, restored_step=2)
    tracker.log(3, {"loss": 0.25})
    tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert found == [(1, 1.0), (2, 0.5), (3, 0.25)], "step 3 once"
    assert [event.step for event in events.Scalars("data/retain_ratio")] == [1, 2]
    assert [(event.step, event.value) for event in events.Scalars("eval/accuracy")] == [(2, 0.5)]
    assert len(read_metrics(tmp_path)) == 5


def test_a_tracker_that_fails_costs_no_row_and_one_that_is_missing_is_refused(tmp_path, caplog):
    class Broken(Mirror):
        name = "broken"

        def _start(self) -> None:
            raise OSError("no such server")

    tracker = Tracker(tmp_path, DISABLED, "run", {})
    tracker._mirrors.append(Broken())
    tracker._mirrors[0].begin()
    tracker.log(1, {"loss": 1.0})
    tracker.show_evaluations(1)
    tracker.close()
    assert "broken failed and is off for the rest of the run" in caplog.text
    assert len(read_metrics(tmp_path)) == 1
    with pytest.raises(ValueError, match="also: expected a list of tensorboard, mlflow, swanlab"):
        TrackingSettings(also=["clearml"])
    if find_spec("swanlab") is None:
        with pytest.raises(UserError, match=r"tracking\.also: swanlab is not installed"):
            check_installed(TrackingSettings(also=["swanlab"]))


def test_an_offline_run_read_back_has_sections_axes_summaries_and_settings(tmp_path, caplog):
    config = config_to_dict(load_recipe("configs/debug.yaml", ["prune.threshold=0.25", "resize.max_pixels=131072"]))
    with caplog.at_level(logging.INFO):
        tracker = Tracker(tmp_path, TrackingSettings(wandb="offline"), "run", config, run_id="abc")
        for step, loss in enumerate((3.0, 1.0, 2.0), 1):
            tracker.log(step, {"loss": loss, "samples_per_s": 9.0, "data_wait_share": 0.1, "lr_vit": 1e-3})
        tracker.log(3, {"eval_loss": 1.5, "eval_accuracy": 0.5})
        tracker.close()
    (path,) = (tmp_path / "wandb").glob("offline-run-*-abc/run-abc.wandb")
    assert f"upload it with: wandb sync {path.parent}" in caplog.text.splitlines()[-1]
    records = whole_run(path)
    settings = {}
    for record in records:
        for update in (*record.run.config.update, *record.config.update):
            settings[update.key] = json.loads(update.value_json)
    assert settings["prune"]["threshold"] == 0.25
    assert settings["resize"]["max_pixels"] == 131072
    rows = history_of(records)
    assert [row["train/loss"] for row in rows if "train/loss" in row] == [3.0, 1.0, 2.0]
    last = {key: value for row in rows for key, value in row.items()}
    assert (last["step"], last["eval/accuracy"], last["optim/lr_vit"]) == (3, 0.5, 1e-3)
    assert (last["speed/samples_per_s"], last["speed/data_wait_share"]) == (9.0, 0.1)
    metrics = [record.metric for record in records if record.HasField("metric")]
    axes = {metric.name or metric.glob_name: metric.step_metric for metric in metrics}
    assert {axes[f"{section}/*"] for section in ("train", "eval", "speed", "memory", "data", "optim")} == {"step"}
    best = {metric.name: metric.summary for metric in metrics if metric.name}
    assert best["eval/accuracy"].max
    assert best["train/loss"].last
    assert best["eval/loss"].min


def test_every_metric_of_a_run_has_its_section():
    sections = {"train", "eval", "speed", "memory", "data", "optim"}
    assert {sectioned(metric.name).partition("/")[0] for metric in METRICS} <= sections
    assert sectioned("eval_token_accuracy") == "eval/token_accuracy"
    assert sectioned("kl") == "train/kl"
    assert sectioned("peak_memory_gb") == "memory/peak_memory_gb"


@contextmanager
def little_room():
    """No file of this process grows beyond 100 bytes: the operating system itself refuses, half-way through a line.

    Around the calls alone: the test run's own output may go to a file, too.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_rows_that_find_no_room_are_missing_and_said(tmp_path, caplog):
    with little_room():
        tracker = Tracker(tmp_path, DISABLED, "run", {}, go_on=True)
        for step in range(1, 8):
            tracker.log(step, {"loss": 1.0})
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4]
    assert caplog.text.count("cannot be written: File too large; going on without the rows from step 5") == 1
    tracker.log(8, {"loss": 1.0})
    tracker.close()
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4, 8]
    assert "3 rows are missing" in caplog.text


def test_a_row_that_finds_no_room_ends_the_run_in_one_line(tmp_path):
    words = r"the row of step 5 cannot be written: File too large .*checkpoint\.on_error"
    with little_room():
        tracker = Tracker(tmp_path, DISABLED, "run", {})
        for step in range(1, 5):
            tracker.log(step, {"loss": 1.0})
        with pytest.raises(RankError, match=words):
            tracker.log(5, {"loss": 1.0})
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 4


@pytest.mark.parametrize("damage", [b"\xff\xfe", b'{"step": 2, "lo', b"[]", b'{"loss": 1}', b""])
def test_a_damaged_line_is_cut_out_and_said(tmp_path, caplog, damage):
    whole = [b'{"step": 1}', b'{"step": 3}', b'{"step": 4}']
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([whole[0], damage, *whole[1:], b""]))
    Tracker(tmp_path, DISABLED, "run", {}, restored_step=3).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b'{"step": 1}\n{"step": 3}\n'
    assert "line 2 is damaged and left out" in caplog.text
