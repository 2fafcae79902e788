"""A shard of teacher targets that is not what was written: one line that names it."""

import os

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


@pytest.mark.parametrize("bad", [-1, 50, 2**31 - 1])
def test_token_ids_beyond_the_vocabulary_are_named(tmp_path, bad):
    """The loss would gather and scatter by them: an index error on a CPU, anything at all on a GPU."""
    ids = torch.tensor([[0, 49], [3, 2], [1, 0]], dtype=torch.int32)
    values = {"log_probs": torch.full((3, 2), -1.0), "ids": ids}
    write_shard(tmp_path, [TargetEntry(0, LABELS, values)])
    assert torch.equal(TargetReader(tmp_path, 50).read(0, LABELS, "a:0")["ids"], ids)
    damaged = ids.clone()
    damaged[1, 1] = bad
    path = write_shard(tmp_path, [TargetEntry(1, LABELS, values | {"ids": damaged})])
    said = rf"{path.name}: not a readable shard .*ids of record 'a:1' run from .*{bad}.*, expected 0 to 49.*delete it"
    with pytest.raises(UserError, match=said) as caught:
        TargetReader(tmp_path, 50).read(1, LABELS, "a:1")
    assert "\n" not in str(caught.value)


def test_a_shard_that_shrinks_after_it_was_opened_is_named(tmp_path):
    """Its pages are gone: to read one would be a SIGBUS."""
    path = write_shard(tmp_path, [TargetEntry(i, LABELS, {"hidden": torch.ones(3, 4000)}) for i in range(2)])
    reader = TargetReader(tmp_path)
    reader.read(0, LABELS, "a:0")
    os.truncate(path, 5000)
    with pytest.raises(UserError, match=rf"{path.name}: the file has become shorter since it was opened"):
        reader.read(1, LABELS, "a:1")
