"""A shard of teacher targets that is not what was written: one line that names it."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from training.data.targets import TargetEntry, TargetReader, write_shard
from training.errors import UserError

LABELS = np.arange(3)


def nothing_ends_there(tensors):
    tensors["starts"][-1] += 1


def starts_backwards(tensors):
    tensors["starts"][1] = 99


def starts_are_missing(tensors):
    del tensors["starts"]


def an_entry_too_many(tensors):
    tensors["content_hash"] = torch.cat([tensors["content_hash"], torch.tensor([7])])


def no_number(tensors):
    tensors["hidden"][4, 1] = torch.nan


@pytest.mark.parametrize(
    "damage", [nothing_ends_there, starts_backwards, starts_are_missing, an_entry_too_many, no_number]
)
def test_a_damaged_shard_is_named(tmp_path, damage):
    entries = [TargetEntry(i, LABELS, {"hidden": torch.full((3, 2), float(i))}) for i in range(2)]
    path = write_shard(tmp_path, entries)
    assert TargetReader(tmp_path).read(1, LABELS, "a:1")["hidden"].tolist() == [[1.0, 1.0]] * 3
    tensors = load_file(path)
    damage(tensors)
    path.unlink()
    # Under another name: a process keeps shards open by theirs.
    path = path.with_name("shard-0123456789abcdef.safetensors")
    save_file(tensors, path)
    with pytest.raises(UserError, match=rf"{path.name}: not a readable shard .*; delete it") as caught:
        TargetReader(tmp_path).read(1, LABELS, "a:1")
    assert "\n" not in str(caught.value)
