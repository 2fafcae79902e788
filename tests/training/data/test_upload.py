"""Packs arrive where they are computed, unchanged; on CUDA the copies run beside the computation."""

import dataclasses

import pytest
import torch

from pixelprune.pack import VisionGeometry
from pixelprune.records.collator import PixelPruneCollator
from tests.samples import chat_row, draw_screen
from training.composition.toy import toy_config
from training.data.upload import copy_stream, upload_ahead
from training.data.worker import PackResult


@pytest.fixture
def results(preparer, tokenizer):
    collator = PixelPruneCollator(preparer, VisionGeometry.from_config(toy_config(tokenizer)))
    rows = [chat_row(None, f"question {i}") for i in range(5)]
    for i, row in enumerate(rows):
        row["messages"][0]["content"].insert(0, {"type": "image", "image": draw_screen(i, 640, 480)})
    return [PackResult(collator.pack([preparer.prepare(row, None).sample]), False) for row in rows]


def test_on_the_cpu_packs_stay_as_they_are(results):
    uploaded = list(upload_ahead(results, torch.device("cpu")))
    assert [pack for pack, _ in uploaded] == [result.pack for result in results]
    assert [result for _, result in uploaded] == results


def test_all_steps_copy_on_one_stream(monkeypatch):
    made = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: made.append(device) or object())
    copy_stream.cache_clear()
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    assert len({id(copy_stream(device)) for device in (first, second) * 40}) == 2
    assert made == [first, second]
    copy_stream.cache_clear()


@pytest.mark.cuda
def test_many_steps_reserve_no_more_memory_than_one(results):
    device, reserved = torch.device("cuda", 0), []
    pinned = [result.pin_memory() for result in results]
    for _ in range(40):
        for _pack, _result in upload_ahead(pinned, device):
            pass
        torch.cuda.synchronize(device)
        reserved.append(torch.cuda.memory_reserved(device))
    assert reserved[-1] == reserved[1]


@pytest.mark.cuda
def test_on_cuda_every_pack_arrives_whole_and_in_order(results):
    device = torch.device("cuda")
    pinned = [result.pin_memory() for result in results]
    for (pack, result), original in zip(upload_ahead(pinned, device), results, strict=True):
        busy = torch.randn(2000, 2000, device=device)
        for _ in range(20):
            busy = busy @ busy / 2000
        assert result.num_lost_supervised == 0
        for field in dataclasses.fields(pack):
            moved, here = getattr(pack, field.name), getattr(original.pack, field.name)
            if isinstance(moved, torch.Tensor):
                assert moved.device.type == "cuda"
                assert torch.equal(moved.cpu(), here)
