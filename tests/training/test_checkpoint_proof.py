"""A checkpoint proves that it is whole: each kind of damage is found by name, and the one before it is taken."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import xxhash
from safetensors.torch import save_file

from training.checkpoint.checkpointer import Checkpointer
from training.checkpoint.files import checkpoint_folder, complete_checkpoints
from training.checkpoint.proof import MARKER, hash_of_tensors, read_marker, what_is_broken
from training.config.settings import CheckpointSettings
from training.distributed.fragments import KINDS, Fragment
from training.distributed.ranks import Ranks
from training.errors import UserError

FACTS = {"config.yaml": "run: {}\n", "environment.json": "{}"}


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def checkpointer(tmp_path: Path, **settings) -> Checkpointer:
    return Checkpointer(tmp_path, CheckpointSettings(**settings), Ranks(0, 1, 0, torch.device("cpu")), FACTS)


def save(to: Checkpointer, step: int) -> Path:
    """As the thread of a save does it, with one parameter."""
    fragments = [Fragment("a", 0, (5,), {kind: torch.randn(5) for kind in KINDS})]
    folder = checkpoint_folder(to.root, step)
    to._write_or_keep_error(folder, fragments, {"torch": torch.get_rng_state()}, {"world_size": 1, "step": step})
    to.finish()
    return folder


def flip_a_bit(path: Path, place: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    data[int(place * (len(data) - 1))] ^= 1 << 3
    path.write_bytes(data)


def test_the_hash_of_tensors_in_memory_is_that_of_their_file(tmp_path):
    tensors = {
        "z": torch.randn(7, 3),
        "a": torch.randn(4).bfloat16(),
        "empty": torch.zeros(0),
        "bytes": torch.arange(9, dtype=torch.uint8),
        "long": torch.tensor([1, 2]),
        "one": torch.tensor(2.5, dtype=torch.float64),
    }
    save_file(tensors, tmp_path / "t", metadata={"places": "{}"})
    expected = xxhash.xxh3_128((tmp_path / "t").read_bytes()).hexdigest()
    assert hash_of_tensors(tmp_path / "t", tensors) == expected
    tensors["a"][2] += 1
    assert hash_of_tensors(tmp_path / "t", tensors) != expected


def test_the_marker_lists_every_file(tmp_path):
    folder = save(checkpointer(tmp_path), 1)
    hashes = read_marker(folder)
    assert sorted([*hashes, MARKER]) == sorted(path.name for path in folder.iterdir())
    assert set(hashes) == {
        "config.yaml", "environment.json", "state.json",
        "fragments-000-of-001.safetensors", "random-000-of-001.safetensors",
    }  # fmt: skip
    for name, value in hashes.items():
        assert value == xxhash.xxh3_128((folder / name).read_bytes()).hexdigest()
    assert what_is_broken(folder) == []


def test_one_flipped_bit_anywhere_is_found_by_its_file(tmp_path):
    whole = save(checkpointer(tmp_path), 1)
    for name in read_marker(whole):
        for place in (0, 0.5, 1):
            folder = tmp_path / "damaged"
            shutil.copytree(whole, folder)
            flip_a_bit(folder / name, place)
            (line,) = what_is_broken(folder)
            assert line.startswith(f"{name}: its bytes are not those that were written")
            shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: (f / "state.json").write_bytes(b""), "state.json: its bytes"),
        (lambda f: (f / "fragments-000-of-001.safetensors").write_bytes(b"\0" * 40), "fragments-000-of-001"),
        (lambda f: (f / "random-000-of-001.safetensors").unlink(), "random-000-of-001.safetensors: No such file"),
        (lambda f: (f / MARKER).write_text("{"), "COMPLETE: "),
        (lambda f: (f / MARKER).write_text("[]"), "COMPLETE: no hashes in it"),
    ],
)
def test_a_broken_newest_one_is_set_aside_and_the_one_before_it_taken(damage, said, tmp_path, group, caplog):
    run = checkpointer(tmp_path, keep_last=3)
    first, second = save(run, 1), save(run, 2)
    damage(second)
    with caplog.at_level(logging.WARNING):
        assert checkpointer(tmp_path).latest() == first
    assert f"step-00000002 is BROKEN: {said}" in caplog.text
    assert "1 optimizer steps after it, up to 2, are lost and made again" in caplog.text
    assert sorted(p.name for p in run.root.iterdir()) == ["step-00000001", "step-00000002.broken"]


def test_two_broken_ones_cost_both(tmp_path, group, caplog):
    run = checkpointer(tmp_path, keep_last=3)
    first = save(run, 1)
    for step in (2, 3):
        flip_a_bit(save(run, step) / "state.json")
    assert checkpointer(tmp_path).latest() == first
    assert "the 2 optimizer steps after it, up to 3" in caplog.text


def test_stop_refuses_and_leaves_all_as_it_is(tmp_path, group):
    run = checkpointer(tmp_path)
    save(run, 1)
    flip_a_bit(save(run, 2) / "state.json")
    with pytest.raises(UserError, match=r"step-00000002: state\.json: .*checkpoint\.on_broken=fall_back"):
        checkpointer(tmp_path, on_broken="stop").latest()
    assert sorted(p.name for p in run.root.iterdir()) == ["step-00000001", "step-00000002"]


def test_where_all_are_broken_nothing_starts_anew(tmp_path, group):
    run = checkpointer(tmp_path)
    for step in (1, 2):
        flip_a_bit(save(run, step) / "config.yaml")
    with pytest.raises(UserError, match=r"step-00000002.*step-00000001.*no whole checkpoint is left: .*run\.name"):
        checkpointer(tmp_path).latest()
    assert len(complete_checkpoints(run.root)) == 2


def test_only_names_that_a_save_gives_are_checkpoints(tmp_path, group):
    run = checkpointer(tmp_path)
    folder = save(run, 7)
    best = shutil.copytree(folder, run.root / "step-best")
    (run.root / "step-00000009-mine").mkdir()
    assert checkpointer(tmp_path).latest() == folder
    assert best.is_dir()
    assert (run.root / "step-00000009-mine").is_dir()


def test_the_one_that_was_read_back_whole_is_kept_until_another_was(tmp_path, group):
    run = checkpointer(tmp_path, keep_last=1)
    save(run, 1)
    resumed = checkpointer(tmp_path, keep_last=1)
    resumed.latest()
    for step in (2, 3):
        save(resumed, step)
    assert [path.name for path in complete_checkpoints(run.root)] == ["step-00000001", "step-00000003"]
    again = checkpointer(tmp_path, keep_last=1)
    assert again.latest().name == "step-00000003"
    save(again, 4)
    assert [path.name for path in complete_checkpoints(run.root)] == ["step-00000003", "step-00000004"]


def test_one_of_an_earlier_version_is_read_and_said_to_be_unproven(tmp_path, group, caplog):
    run = checkpointer(tmp_path)
    folder = save(run, 1)
    (folder / MARKER).write_bytes(b"")
    assert checkpointer(tmp_path).latest() == folder
    assert "of an earlier version, without hashes" in caplog.text


def test_ranks_share_the_reading(tmp_path):
    folder = save(checkpointer(tmp_path), 1)
    for name in json.loads((folder / MARKER).read_text())["xxh3_128"]:
        flip_a_bit(folder / name)
    shares = [what_is_broken(folder, part=part, num_parts=3) for part in range(3)]
    assert [len(share) for share in shares] == [2, 2, 1]
    assert len({line.split(":")[0] for share in shares for line in share}) == 5
