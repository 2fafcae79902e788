"""What goes wrong on one rank of two while a run goes on: full disks, numbers that are none, too little memory."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.ranks import start_ranks
from tests.training.debug_run import call, overrides
from training.checkpoint.files import complete_checkpoints
from training.exit_codes import RESUMABLE
from training.tracking.tracker import read_metrics

pytestmark = pytest.mark.ranks


@pytest.fixture
def run_with(data, toy_folder, tmp_path):
    """Start the debug recipe on two ranks with a fault: (finished process, run folder)."""

    def run(fault: str, *more: str):
        settings = ["schedule.max_steps=4", "checkpoint.every_steps=1", "eval.at_start=false", "data.eval_sources=[]"]
        arguments = overrides(data, toy_folder, tmp_path, "run.seed=1")
        arguments = [argument for argument in arguments if not argument.startswith("data.eval_sources")]
        program = "tests.training.fault_program"
        return start_ranks(program, 2, fault, "configs/debug.yaml", *arguments, *settings, *more), tmp_path / "debug"

    return run


def test_a_full_disk_ends_the_run_and_leaves_the_last_checkpoint(run_with):
    done, folder = run_with("full-disk")
    assert done.returncode == 2, done.stderr[-3000:]
    assert re.search(
        r"No space left on device: \S*fragments-001-of-002.safetensors.; complete ones: step-00000001", done.stderr
    )
    assert [path.name for path in complete_checkpoints(folder / "checkpoints")] == ["step-00000001"]
    assert "Traceback" not in done.stderr


def test_a_run_that_is_told_to_goes_on_past_a_full_disk(run_with):
    done, folder = run_with("full-disk", "checkpoint.on_error=continue", "checkpoint.keep_last=9")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "going on (checkpoint.on_error=continue)" in done.stderr
    saved = [path.name for path in complete_checkpoints(folder / "checkpoints")]
    assert saved == ["step-00000001", "step-00000003", "step-00000004"]
    assert [row["step"] for row in read_metrics(folder)] == [1, 2, 3, 4]


def test_a_run_that_is_told_to_goes_on_where_nothing_at_all_can_be_written(run_with):
    """From its start: recipe, metrics and checkpoints are each said to be missing, and training goes to its end."""
    done, folder = run_with(
        "no-room", "checkpoint.on_error=continue", "checkpoint.every_steps=2", "checkpoint.export_at_end=false"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"config\.yaml: the recipe in the run's folder cannot be written: File too large; go", done.stderr)
    assert re.search(r"metrics\.jsonl: cannot be written: File too large; going on without the rows from", done.stderr)
    assert "4 rows are missing" in done.stderr
    assert done.stderr.count("going on (checkpoint.on_error=continue)") >= 2, "checkpoints"
    assert complete_checkpoints(folder / "checkpoints") == []
    assert "Traceback" not in done.stderr


def test_a_disk_that_is_full_at_the_start_is_one_line(run_with):
    done, _ = run_with("no-room")
    assert done.returncode == 2, done.stderr[-3000:]
    said = r"error: .*the recipe in the run's folder cannot be written: File too large .*checkpoint\.on_error=continue"
    assert re.search(said, done.stderr)
    assert "Traceback" not in done.stderr


def test_a_loss_that_is_no_number_skips_one_step_on_all_ranks(run_with):
    done, folder = run_with("not-a-number")
    assert done.returncode == 0, done.stderr[-3000:]
    rows = read_metrics(folder)
    # Each rank has one forward per step here: the second step is the bad one.
    assert [row["num_skipped"] for row in rows] == [0, 1, 1, 1]
    assert rows[1]["loss"] is None
    assert all(row["loss"] is not None for row in rows[2:])
    assert "step 2 skipped: loss or gradient not finite; records on this rank" in done.stderr
    weights = load_file(folder / "export" / "model.safetensors")
    assert all(torch.isfinite(weight).all() for weight in weights.values())


def test_a_skipped_first_step_is_saved(run_with):
    done, folder = run_with("not-a-number-at-first", "schedule.max_steps=1", "schedule.warmup_steps=0")
    assert done.returncode == 0, done.stderr[-3000:]
    checkpoint = folder / "checkpoints" / "step-00000001"
    assert complete_checkpoints(folder / "checkpoints") == [checkpoint]
    state = json.loads((checkpoint / "state.json").read_text())
    assert (state["num_skipped"], state["num_adam_steps"]) == (1, 0)
    moments = load_file(next(checkpoint.glob("fragments-000*")))
    assert all(not tensor.any() for name, tensor in moments.items() if "exp_avg" in name)


def test_no_rank_leaves_a_stop_before_all_have_saved(run_with):
    """The launcher would kill the others 30 s later, also one that still writes."""
    done, folder = run_with("slow-disk", "checkpoint.every_steps=0")
    assert done.returncode == RESUMABLE, done.stderr[-3000:]
    assert [path.name for path in complete_checkpoints(folder / "checkpoints")] == ["step-00000002"]
    assert json.loads((folder / "second-rank-saw.json").read_text()) == ["step-00000002"]


INTERRUPTED = {
    "stop-in-validation": ("eval.every_steps=2", "data.samples_per_step=2"),  # the loader makes two steps of it
    "stop-in-answers": (
        "eval.grounding_every_steps=2",
        "eval.grounding_batch_size=1",
        "eval.grounding_max_new_tokens=4",
    ),
}


@pytest.mark.parametrize("fault", INTERRUPTED)
def test_a_stop_interrupts_an_evaluation_and_the_next_start_makes_it_up(fault, data, toy_folder, tmp_path):
    """Schedulers leave seconds: they go to the checkpoint of the last step, not to the rest of an evaluation."""
    rows = [json.loads(line) for line in (data / "eval.jsonl").read_text().splitlines()]
    lines = [json.dumps(row | {"metadata": {"bbox": [0, 0, 32, 32]}}) for row in rows]
    (tmp_path / "eval.jsonl").write_text("\n".join(lines))
    settings = ["schedule.max_steps=3", "checkpoint.every_steps=0", "eval.at_start=false", *INTERRUPTED[fault]]
    arguments = ["configs/debug.yaml", *overrides(data, toy_folder, tmp_path, *settings)]
    arguments += [f"data.eval_sources.0.path={tmp_path / 'eval.jsonl'}", f"data.eval_sources.0.root={data}"]
    folder = tmp_path / "debug"

    # Asked again as the next start makes it up, it stops again, and says so.
    for _ in range(2 if fault == "stop-in-validation" else 1):
        done = start_ranks("tests.training.fault_program", 2, fault, *arguments)
        assert done.returncode == RESUMABLE, done.stderr[-3000:]
        assert done.stderr.count("stopped after step 2, saved; start again to continue") == 1, done.stderr[-3000:]
        assert [path.name for path in complete_checkpoints(folder / "checkpoints")] == ["step-00000002"]
    name = "eval_loss" if fault == "stop-in-validation" else "eval_accuracy"
    assert not [row for row in read_metrics(folder) if name in row]

    done = call("launch", *arguments, "--ranks", "2")
    assert done.returncode == 0, done.stderr[-3000:]
    rows = read_metrics(folder)
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3]
    assert [row["step"] for row in rows if name in row] == [2, 3]


def test_one_flipped_bit_in_a_checkpoint_costs_its_steps_and_nothing_else(data, toy_folder, tmp_path):
    """The second rank's weights of the newest checkpoint: both ranks go back, and arrive at the same weights."""
    settings = ["checkpoint.every_steps=1", "checkpoint.keep_last=9", "eval.at_start=false", "schedule.max_steps=3"]
    command = ["launch", "configs/debug.yaml", *overrides(data, toy_folder, tmp_path, *settings), "--ranks", "2"]
    folder = tmp_path / "debug"
    assert call(*command).returncode == 0
    loss = {row["step"]: row["loss"] for row in read_metrics(folder) if "loss" in row}
    newest = folder / "checkpoints" / "step-00000003"
    whole = {path.name: path.read_bytes() for path in newest.glob("*.safetensors")}
    path = newest / "fragments-001-of-002.safetensors"
    path.write_bytes(whole[path.name][:-1] + bytes([whole[path.name][-1] ^ 1]))

    done = call(*command)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "step-00000003 is BROKEN: fragments-001-of-002.safetensors" in done.stderr
    assert "going back to" in done.stderr
    assert {row["step"]: row["loss"] for row in read_metrics(folder) if "loss" in row} == loss
    assert {path.name: path.read_bytes() for path in newest.glob("*.safetensors")} == whole


def test_too_little_memory_names_the_pack_and_the_settings(run_with):
    done, _ = run_with("out-of-memory")
    assert done.returncode == 2, done.stderr[-3000:]
    line = next(line for line in done.stderr.splitlines() if "out of memory" in line)
    assert line.startswith("error: rank 1, step 2: out of memory in a pack of ")
    for part in ("tokens", "patches", "records train:", "data.pack_tokens", "data.pack_patches"):
        assert part in line, line


def test_a_run_that_only_skips_ends_with_the_records(data, toy_folder, tmp_path):
    broken = shutil.copytree(toy_folder, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    name = next(name for name in weights if name.endswith("norm.weight"))
    weights[name][0] = torch.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    settings = ["optim.max_skipped_in_a_row=3", "eval.at_start=false"]
    done = call("launch", "configs/debug.yaml", *overrides(data, broken, tmp_path, *settings), "--ranks", "1")
    assert done.returncode == 2, done.stderr[-3000:]
    line = next(line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert "3 steps in a row had a non-finite loss or gradient" in line
    assert "train:" in line
    rows = [json.loads(row) for row in (tmp_path / "debug" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
