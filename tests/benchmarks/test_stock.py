"""The baseline of `benchmarks.step_stock` is the same training: loss and gradients of stock code are ours."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.exact_screens import write_exact_screens
from benchmarks.parts.shapes import random_model
from benchmarks.parts.stock import StockTrainer
from benchmarks.step_stock import summarise
from pixelprune.attention.segments import takes_borders
from pixelprune.pack import VisionGeometry, pack_samples
from pixelprune.records.chat import ChatEncoder
from pixelprune.records.prepare import Preparer
from pixelprune.settings import PruneSettings, ResizeSettings
from training.composition.toy import build_tokenizer
from training.loss.supervised import LossSettings
from training.model.supervised import SupervisedModel


@pytest.mark.parametrize("padded", [False, True])
def test_a_stock_step_is_a_step_of_full(padded, tmp_path):
    records = write_exact_screens(tmp_path, 2, 0.02, 0.4)
    rows = [json.loads(line) for line in records.read_text().splitlines()]
    rows[1]["messages"][0]["content"][1]["text"] = "Another, longer question about this one?"
    tokenizer, resize = build_tokenizer(), ResizeSettings(min_pixels=1024)
    model = random_model("toy", device=torch.device("cpu"), dtype=torch.float32).train()
    geometry = VisionGeometry.from_config(model.config)
    stock = StockTrainer(model, tokenizer, resize, attention="sdpa", lr=1e-3)
    assert takes_borders(model), "the stock model's attention is its own"
    assert not takes_borders(stock.model)
    preparer = Preparer(ChatEncoder(tokenizer), PruneSettings("none"), resize, model.config.image_token_id)
    pack = pack_samples([preparer.prepare(row, tmp_path).sample for row in rows], geometry)
    loss = SupervisedModel(model, geometry, LossSettings())(pack).total / pack.num_supervised
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    seen = {}
    for name, parameter in stock.model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: seen.__setitem__(name, p.grad))
    assert stock.step(rows, tmp_path, padded=padded) == pytest.approx(loss.item(), rel=1e-6)
    differences = [(seen[n] - p.grad).square().sum() for n, p in model.named_parameters() if p.grad is not None]
    whole = sum(p.grad.square().sum() for p in model.parameters() if p.grad is not None)
    assert sum(differences) < 1e-10 * whole  # float32 sums in another order
    moved = [(a - b).abs().max() for a, b in zip(stock.model.parameters(), model.parameters(), strict=True)]
    assert max(moved) > 1e-4


def test_a_way_is_set_beside_the_faster_stock_way_of_the_same_round():
    def steps(*seconds: float) -> list[dict[str, float]]:
        return [{"wall_s": s, "cpu_s": s / 2, "added_bytes": 1, "loss": 0.0} for s in seconds]

    found = {"stock, one by one": steps(2, 4, 4), "stock, padded": steps(8, 8, 8), "Full": steps(2, 8, 4)}
    rows = {row["way"]: row for row in summarise(3, found, {})}
    assert rows["Full"]["speed_up_by_round"]["wall_s"] == [1.0, 0.5, 1.0]
    assert (rows["Full"]["speed_up_wall_s"], rows["stock, padded"]["speed_up_cpu_s"]) == (1.0, 0.5)
