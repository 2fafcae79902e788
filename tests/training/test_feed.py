"""A run that goes on after its data changed: refused by name, or a new epoch, never other samples unsaid."""

from __future__ import annotations

import json

import pytest
from transformers import AutoConfig

from pixelprune.flops import CostModel
from pixelprune.records.prepare import PrepareSettings
from pixelprune.settings import PruneSettings, ResizeSettings
from tests.training.debug_run import call, overrides, write_records
from training.config.settings import Config, GroupSettings, OptimSettings
from training.data.index_builder import build_index
from training.data.loader import Cursor
from training.data.plan import PlanSettings, epoch_order, order_of
from training.data.settings import DataSettings, SourceSettings
from training.errors import UserError
from training.loop.feed import Feed, cost_model
from training.model.lora import LoraSettings
from training.tracking.tracker import read_metrics


def make_feed(folder, model_folder, *, weight=1.0, pack_tokens=4096, **plan) -> Feed:
    prepare = PrepareSettings(str(model_folder), PruneSettings(), ResizeSettings(min_pixels=32 * 32))
    sources = [SourceSettings(str(folder / "train.jsonl"), weight=weight)]
    index = build_index(sources, prepare, num_workers=0, show_progress=False)
    index = index.without_over_long(DataSettings(pack_tokens=pack_tokens))
    inputs = index.plan_input(CostModel.from_config(AutoConfig.from_pretrained(model_folder)))
    settings = PlanSettings(**{"samples_per_step": 4, "pack_tokens": pack_tokens, "pack_patches": 4096} | plan)
    return Feed(index, prepare, inputs, settings)


@pytest.fixture
def records(tmp_path):
    write_records(tmp_path, "train", 12)
    return tmp_path


def test_the_same_order_goes_on_where_it_was(records, toy_folder):
    feed = make_feed(records, toy_folder)
    again = make_feed(records, toy_folder, pack_tokens=2048, pack_patches=1024)
    assert again.continued(Cursor(1, 2), feed.order, "stop") == Cursor(1, 2), "caps that lose no record change no order"


def longest(feed: Feed) -> int:
    return int(feed.plan_input.tokens.max())


def test_what_changes_the_order_changes_its_facts(records, toy_folder):
    feed = make_feed(records, toy_folder)
    others = {
        "a record is too long": make_feed(records, toy_folder, pack_tokens=longest(feed) - 1),
        "weights": make_feed(records, toy_folder, weight=0.5),
        "samples per step": make_feed(records, toy_folder, samples_per_step=6),
        "seed": make_feed(records, toy_folder, seed=1),
        "no shuffling": make_feed(records, toy_folder, shuffle=False),
        "over screenshots": make_feed(records, toy_folder, max_shared=4),
    }
    orders = [order_of(f.plan_input, f.plan_settings, 0).tolist() for f in others.values()]
    mine = epoch_order(feed.plan_input, seed=0, epoch=0).tolist()
    assert order_of(feed.plan_input, feed.plan_settings, 0).tolist() == mine
    assert sum(order != mine for order in orders) == 5, "all but the step's size assign other samples"
    for name, other in others.items():
        assert other.order != feed.order, name
        with pytest.raises(UserError, match=r"not the checkpoint's any more .*checkpoint\.on_changed_data"):
            other.continued(Cursor(0, 1), feed.order, "stop")
        with pytest.raises(UserError, match="the order of samples is not the checkpoint's any more"):
            feed.continued(Cursor(0, 1), other.order, "stop")


def test_records_that_changed_places_are_noticed(records, toy_folder):
    before = make_feed(records, toy_folder).order
    path = records / "train.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[1], lines[0], *lines[2:]]) + "\n")
    after = make_feed(records, toy_folder)
    assert after.order["usable records"] == before["usable records"]
    with pytest.raises(UserError, match="hash of records and weights"):
        after.continued(Cursor(0, 1), before, "stop")


@pytest.mark.parametrize(
    ("cursor", "expected"), [(Cursor(0, 1), Cursor(1, 0)), (Cursor(2, 0), Cursor(2, 0)), (Cursor(0, 0), Cursor(0, 0))]
)
def test_going_on_with_a_new_epoch(records, toy_folder, cursor, expected):
    feed = make_feed(records, toy_folder)
    before = feed.order | {"run.seed": 9}
    assert feed.continued(cursor, before, "next_epoch") == expected


def test_facts_survive_a_json_file(records, toy_folder):
    order = make_feed(records, toy_folder).order
    assert json.loads(json.dumps(order)) == order


@pytest.mark.parametrize(
    ("changes", "is_frozen"),
    [
        ({}, False),
        ({"optim": OptimSettings(vit=GroupSettings(freeze=True))}, True),
        ({"lora": LoraSettings(rank=4)}, True),
        ({"lora": LoraSettings(rank=4, vit=True), "optim": OptimSettings(vit=GroupSettings(freeze=True))}, False),
    ],
)
def test_packs_cost_a_backward_pass_of_the_tower_where_it_is_trained(toy_folder, changes, is_frozen):
    hf_config = AutoConfig.from_pretrained(toy_folder)
    expected = CostModel.from_config(hf_config, freeze_vit=is_frozen)
    assert cost_model(Config(**changes), hf_config) == expected
    assert CostModel.from_config(hf_config, freeze_vit=not is_frozen) != expected


@pytest.mark.ranks
def test_a_real_run_refuses_and_goes_on(records, toy_folder, tmp_path):
    write_records(records, "eval", 2)
    settings = overrides(
        records, toy_folder, tmp_path / "runs", "data.eval_sources=[]", "checkpoint.export_at_end=false"
    )
    settings = [s for s in settings if not s.startswith("data.eval_sources.0")]

    def start(*more):
        return call("launch", "configs/debug.yaml", *settings, *more, "--ranks", "1")

    assert start("schedule.max_steps=3").returncode == 0
    refused = start("schedule.max_steps=6", "data.samples_per_step=4")
    assert refused.returncode == 2
    assert "data.samples_per_step 6 -> 4" in refused.stderr
    done = start("schedule.max_steps=6", "data.samples_per_step=4", "checkpoint.on_changed_data=next_epoch")
    assert done.returncode == 0, done.stderr[-3000:]
    steps = [row for row in read_metrics(tmp_path / "runs" / "debug") if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    assert [row["num_samples"] for row in steps] == [6, 6, 6, 4, 4, 4]
