"""The debug recipe on two real ranks: its loss curve, and what kills, stops and other numbers of ranks do to it.

The arithmetic is held to instructions that every x86-64 machine computes alike, so that a stored curve can be compared
exactly; `python -m tests.training.test_resume` writes it anew after a change that is meant to change it.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from benchmarks.parts.drill_runs import ROOT, Kill, Run, has_equal_bits, largest_difference, prepare
from benchmarks.parts.walked import SAMPLES as SESSIONS
from launch.processes import descendants, send
from training.exit_codes import RESUMABLE
from training.tracking.tracker import read_metrics

CURVE = Path(__file__).with_name("debug_curve.json")
SAME_EVERYWHERE = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE"}
# The data ends after 12 steps: the curve and the resumes cross the border of an epoch.
FIFTEEN_STEPS = "schedule.max_steps=15"

pytestmark = pytest.mark.ranks


def make_run(folder: Path, name: str, *overrides: str) -> Run:
    return Run(folder, name, FIFTEEN_STEPS, *overrides, environment=os.environ | SAME_EVERYWHERE)


def finished_reference(folder: Path) -> Run:
    prepare(folder)
    # Initial weights are drawn with vector instructions, too.
    command = [sys.executable, "-m", "training.toy_model", str(folder / "toy")]
    subprocess.run(command, cwd=ROOT, env=os.environ | SAME_EVERYWHERE, check=True, capture_output=True)
    run = make_run(folder, "reference")
    run.finish(2)
    return run


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Run:
    return finished_reference(tmp_path_factory.mktemp("drill"))


def test_the_loss_curve_is_the_stored_one(reference):
    """Counts to the bit, losses and norms to 1e-6: other processors round the same products in another last bit (up to
    4e-7 over these steps when seen). Whether a change keeps the bits shows on one machine, before and after it."""
    rows, stored = [row for row in reference.steps() if "loss" in row], json.loads(CURVE.read_text())
    assert len(rows) == len(stored)
    for row, expected in zip(rows, stored, strict=True):
        assert row == pytest.approx(expected, rel=1e-6, abs=0)
        counts = [key for key in expected if key not in ("loss", "grad_norm")]
        assert {key: row[key] for key in counts} == {key: expected[key] for key in counts}


def test_a_rank_killed_while_saving_costs_nothing(reference):
    """In an order over screenshots, which a resume has to find again; `benchmarks.kill` kills in the usual one."""
    whole, killed = (make_run(reference.folder.parent, name, "data.share_prefix=group") for name in ("whole", "killed"))
    whole.finish(2)
    assert most(whole, "shared_prefix") > 0.1
    assert largest_difference(whole, reference) > 1e-3, "it is another order"
    kill = killed.kill(Kill("one rank", in_save=True), random.Random(3))
    assert kill.left_over == []
    assert kill.resumed_from >= kill.after_step - 1
    killed.finish(2)
    assert has_equal_bits(killed, whole)


def test_a_killed_run_on_sessions_goes_on_bit_equal(tmp_path):
    """Windows of three screenshots, each predicted from the next; every process is killed in the middle."""
    prepare(tmp_path)
    sessions = [json.loads(line) for line in (SESSIONS / "sessions.jsonl").open(encoding="utf-8")]
    with (tmp_path / "windows.jsonl").open("w") as file:
        for session in sessions[:6]:
            content = [{"type": "image", "image": step["image"]} for step in session["steps"][:3]]
            asked = {"role": "user", "content": [*content, {"type": "text", "text": "Next?"}]}
            answer = {"role": "assistant", "content": session["steps"][2]["words"]}
            file.write(json.dumps({"messages": [asked, answer]}) + "\n")
    options = [
        f"data.sources=[{{path: {tmp_path / 'windows.jsonl'}, root: {SESSIONS}}}]", "data.eval_sources=[]",
        "data.samples_per_step=1", "data.last_turn_only=true", "schedule.max_steps=6", "resize.max_pixels=65536",
        "prune.strategy=pred3d",
    ]  # fmt: skip
    whole, killed = (Run(tmp_path, name, *options) for name in ("whole", "killed"))
    whole.finish(1)
    front = killed.start(1)
    while killed.newest_step() < 2:
        assert front.poll() is None, killed.log.read_text()[-4000:]
        time.sleep(0.002)
    for victim in descendants(front.pid):
        send(victim, signal.SIGKILL)
    front.kill()
    front.wait(120)
    assert not (killed.folder / "export").exists(), "it was over before its kill"
    killed.finish(1)
    assert has_equal_bits(killed, whole)
    assert max(row["retain_ratio"] for row in whole.steps() if "retain_ratio" in row) < 0.7


def most(run, figure: str) -> float:
    return max(row[figure] for row in read_metrics(run.folder) if figure in row)


def test_stopped_runs_continue_on_another_number_of_ranks(reference):
    """2 ranks until SIGTERM, 1 rank until SIGTERM, 2 ranks to the end: no step is lost, none is made twice.

    With shared prefixes and pictures, which give the same curve in the same order of records.
    """
    run = make_run(reference.folder.parent, "stopped", "data.share_prefix=step", "data.share_vision=step")
    for num_ranks, steps in ((2, 3), (1, 8)):
        front = run.start(num_ranks)
        while max((row["step"] for row in read_metrics(run.folder)), default=0) < steps:
            assert front.poll() is None, run.log.read_text()[-4000:]
            time.sleep(0.01)
        front.send_signal(signal.SIGTERM)  # somewhere within the next step
        assert front.wait(120) == RESUMABLE, run.log.read_text()[-4000:]
        last = read_metrics(run.folder)[-1]["step"]
        assert last <= steps + 2
        assert run.newest_step() == last, "the step in which the signal came is saved"
    run.finish(2)
    assert most(run, "shared_prefix") > 0
    # Sums over another number of ranks are rounded in another order.
    assert largest_difference(run, reference) < 1e-5


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        rows = [row for row in finished_reference(Path(folder)).steps() if "loss" in row]
        CURVE.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
