"""What the clock of a step counts: the step, and nothing that happened between two of them."""

from __future__ import annotations

import time

import pytest
import torch

from training.data.loader import Cursor, MicroBatch
from training.distributed.ranks import Ranks
from training.loop.step import run_step
from training.loss.supervised import LossSums
from training.tracking import hardware
from training.tracking.meter import StepMeter


class Pack:
    """As much of a pack as a step needs, without a model."""

    record_ids = ("a",)
    num_samples, num_supervised, num_tokens, num_full_tokens, num_kept_blocks, num_full_blocks = 1, 4, 10, 16, 6, 12
    loss_weight = 8.0
    num_shared_tokens, num_patches = 2, 12

    def to(self, device, non_blocking=False):
        return self


class Engine:
    """An engine whose forward takes 20 ms."""

    device = torch.device("cpu")

    def __call__(self, pack):
        time.sleep(0.02)
        return LossSums(*(torch.tensor(2.0) for _ in LossSums._fields))

    def set_gradient_accumulation_boundary(self, is_boundary):
        pass

    def backward(self, loss, scale_wrt_gas):
        pass

    def step(self):
        pass


def steps_of(pause: float, slow_data: float = 0.0):
    meter = StepMeter(Ranks(0, 1, 0, torch.device("cpu")))

    def batches():
        time.sleep(slow_data)
        yield MicroBatch(Pack(), 0, 0, True, 4, 8.0, 1, Cursor(0, 1), False)

    for _ in range(2):
        run_step(Engine(), batches(), meter)
        yield meter.finish()
        time.sleep(pause)  # an evaluation, or a save


def test_what_is_done_between_steps_is_no_part_of_them():
    for metrics in steps_of(pause=0.4):
        assert 0.02 <= metrics["step_s"] < 0.4


def test_waiting_for_data_is_part_of_the_step():
    for metrics in steps_of(pause=0.0, slow_data=0.1):
        assert metrics["step_s"] >= 0.12
        assert 0.1 <= metrics["data_wait_share"] * metrics["step_s"] <= metrics["step_s"]
        assert metrics["forward_share"] * metrics["step_s"] >= 0.02
        assert metrics["loss"] == 0.25, "over the weights"
        assert metrics["token_accuracy"] == 0.5, "over the tokens"
        assert metrics["retain_ratio"] == 0.5
        assert metrics["shared_prefix"] == 2 / 12, "of what each record has"
        assert metrics["shared_vision"] == 0.5, "3 of 6 blocks are encoded"


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H20", 148),
        ("NVIDIA H200", 989),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA H1000", None),
    ],
)
def test_the_peak_is_that_of_the_whole_name_and_an_unknown_one_is_said_once(name, teraflops, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    hardware._peak_of.cache_clear()
    found = [hardware.peak_flops(torch.device("cuda", 0)) for _ in range(3)]
    assert found == [teraflops and teraflops * 1e12] * 3
    assert [repr(name) in record.getMessage() for record in caplog.records] == [True] * (teraflops is None)
