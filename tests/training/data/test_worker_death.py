"""Loader workers that are killed: the run gets the same packs from new ones, or one line naming a pack."""

import os
import signal

import pytest

from tests.training.data.test_loader import Setup, same_pack
from training.data import loader as loader_module
from training.data.loader import LoaderSettings
from training.data.worker import PackDataset
from training.errors import RankError


@pytest.fixture
def setup(screens, model_folder) -> Setup:
    return Setup(screens, model_folder)


def worker_processes(loader) -> list:
    return loader._data_loader._iterator._workers


@pytest.mark.parametrize("num_workers", [1, 2])
def test_killed_workers_are_replaced_and_the_packs_are_the_same(setup, num_workers, caplog):
    undisturbed = list(setup.loader())
    loader = setup.loader(settings=LoaderSettings(num_workers=num_workers))
    batches, pids = [], set()
    for step, micro_batches in loader.steps():
        batches += micro_batches
        pids |= {process.pid for process in worker_processes(loader)}
        if step == 1:
            for process in worker_processes(loader):
                os.kill(process.pid, signal.SIGKILL)
                process.join()  # as in the middle of a step: no error may come out of here
    assert len(batches) == len(undisturbed) > 4
    for one, other in zip(batches, undisturbed, strict=True):
        assert one.cursor == other.cursor
        same_pack(one.pack, other.pack)
    assert len(pids) > num_workers, "no worker was replaced"
    assert "new ones prepare what is still to come: DataLoader worker (pid" in caplog.text


class DeadlyDataset(PackDataset):
    """Ends the process that prepares the pack with row 4 in it."""

    def __getitem__(self, task):
        if any(row == 4 for _, row, *_ in task.records):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(task)


def test_a_pack_that_ends_its_workers_is_named_in_one_line(setup, monkeypatch):
    monkeypatch.setattr(loader_module, "MAX_DEATHS", 2)
    loader = setup.loader(settings=LoaderSettings(num_workers=1))
    loader._dataset.__class__ = DeadlyDataset
    with pytest.raises(
        RankError, match=r"2 sets of loader workers died over one pack \(.*data\.num_workers=1"
    ) as caught:
        list(loader)
    assert "train.jsonl, record 5" in str(caught.value)
    assert "\n" not in str(caught.value)
