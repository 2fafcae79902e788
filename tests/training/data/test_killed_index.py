"""An index whose builder is killed at random moments: equal to an undisturbed one, nothing done twice, nobody left."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np

from pixelprune.records.prepare import PrepareSettings
from pixelprune.settings import PruneSettings, ResizeSettings
from tests.ranks import ROOT
from tests.samples import chat_row, draw_screen, write_jsonl
from training.data.index_builder import build_index
from training.data.settings import SourceSettings

NUM_ROWS, ROWS_A_PART = 240, 4
COLUMNS = ("row", "content_hash", "num_supervised", "text_tokens", "kept_blocks", "full_blocks", "image_starts")


def children_of(pid: int) -> list[int]:
    return [int(child) for child in open(f"/proc/{pid}/task/{pid}/children").read().split()]


def is_alive(pid: int) -> bool:
    try:
        return open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def until(holds, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_a_killed_index_goes_on_where_it_was(tmp_path, model_folder):
    for folder in ("undisturbed", "killed"):
        (tmp_path / folder).mkdir()
    for i in range(4):
        draw_screen(i).save(tmp_path / "killed" / f"{i}.png")
    rows = [chat_row(f"{i % 4}.png" if i % 3 else None, f"Question {i}") for i in range(NUM_ROWS)]
    data = write_jsonl(tmp_path / "killed" / "d.jsonl", [*rows[:-1], chat_row("none.png")])
    command = [sys.executable, "-m", "tests.training.data.index_program", str(data), str(model_folder)]
    log, chance = tmp_path / "killed" / "measured.log", random.Random(8)
    on_disk: set[int] = set()
    for _ in range(2):
        builder = subprocess.Popen(command, cwd=ROOT)
        target = len(on_disk) // ROWS_A_PART + chance.randint(2, 20)
        until(lambda target=target: len(list(data.parent.rglob("part-*"))) >= target)
        time.sleep(chance.random() * 0.1)
        helpers = children_of(builder.pid)
        os.kill(builder.pid, signal.SIGKILL)
        builder.wait()
        until(lambda helpers=helpers: not any(map(is_alive, helpers)))
        assert not list(data.parent.rglob("index.parquet")), "it was over before it was killed"
        measured = Counter(log.read_text().split())
        assert not {row for row, times in measured.items() if times > 1 and int(row) in on_disk}, "done twice"
        starts = [int(part.stem.removeprefix("part-")) for part in data.parent.rglob("part-*.parquet")]
        on_disk |= {start + k for start in starts for k in range(ROWS_A_PART)}
        before = Counter(measured)
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 0
    again = Counter(log.read_text().split()) - before
    assert {int(row) for row in again} == set(range(NUM_ROWS)) - on_disk, (
        "what was on the disk, and that alone, is kept"
    )

    # The same index from another folder of the same data, in one go; the rows of its log are no part of it.
    prepare = PrepareSettings(str(model_folder), PruneSettings(), ResizeSettings(min_pixels=32 * 32))
    shutil.copytree(tmp_path / "killed", tmp_path / "undisturbed", dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "undisturbed" / "d.jsonl.index")
    one, other = (
        build_index([SourceSettings(str(tmp_path / folder / "d.jsonl"))], prepare, num_workers=0, show_progress=False)
        for folder in ("killed", "undisturbed")
    )
    assert len(one) == NUM_ROWS - 1
    for name in COLUMNS:
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert [entry.record for entry in one.quarantined] == [f"d:{NUM_ROWS - 1}"]
