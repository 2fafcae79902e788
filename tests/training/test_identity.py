"""What a checkpoint is bound to: every setting has a rule, and each rule does what it says."""

from __future__ import annotations

import copy
import json
import math
import re
import shutil
from dataclasses import replace
from fnmatch import fnmatchcase

import pytest
import torch
from safetensors.torch import load_file, save_file

from pixelprune.settings import PruneSettings
from tests.ranks import ROOT
from tests.training.debug_run import call, overrides
from training.checkpoint.checkpointer import Checkpointer, RunState
from training.checkpoint.identity import RULES, changes_between, kind_of
from training.config.recipe import config_to_dict, load_recipe
from training.config.settings import Config, OptimSettings, ScheduleSettings
from training.data.settings import DataSettings, SourceSettings
from training.distributed.ranks import Ranks
from training.errors import UserError
from training.loop.context import RunContext
from training.loop.continuation import LearningRate, continuation_of
from training.model.loading import load_model_files


def leaves(content: dict, prefix: str = "") -> set[str]:
    found = set()
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            found |= leaves(value, f"{name}.")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for number, item in enumerate(value):
                found |= leaves(item, f"{name}.{number}.")
        else:
            found.add(name)
    return found


def with_sources(*paths: str, **settings) -> Config:
    return Config(data=DataSettings(sources=[SourceSettings(path, **settings) for path in paths]))


def test_every_setting_has_a_rule_and_every_rule_a_setting():
    keys = leaves(config_to_dict(with_sources("a.jsonl")))
    kinds = {key: kind_of(key) for key in keys}
    assert set(kinds.values()) == {"bound", "asked", "said"}
    used = set()
    for key in keys:
        used.add(next(pattern for pattern, _ in RULES if fnmatchcase(key, pattern)))
    assert used == {pattern for pattern, _ in RULES}, "a rule that fits nothing is a typo"
    with pytest.raises(KeyError, match=r"new\.setting"):
        kind_of("new.setting")


def test_what_differs_is_named_with_both_values():
    stored = config_to_dict(Config())
    config = Config(optim=OptimSettings(lr=2e-5))
    assert [str(change) for change in changes_between(stored, config)] == ["optim.lr 1e-05 -> 2e-05"]
    assert changes_between(stored, Config()) == []
    config.run.accept_changes = True
    assert len(changes_between(stored, config)) == 1, "the yes itself is no change"


def test_a_setting_that_the_older_recipe_did_not_have_counts_as_its_default():
    stored = config_to_dict(with_sources("a.jsonl"))
    older = copy.deepcopy(stored)
    del older["optim"]["eps"], older["data"]["sources"][0]["prompt"]
    assert changes_between(older, with_sources("a.jsonl")) == []
    changed = with_sources("a.jsonl", system="You look at screens.")
    changed.optim.eps = 1e-6
    assert {change.key for change in changes_between(older, changed)} == {"optim.eps", "data.sources.0.system"}


def test_a_direction_of_auto_is_compared_as_what_it_comes_to():
    config = Config(prune=PruneSettings("pred3d"))
    stored = config_to_dict(config)
    config.prune = PruneSettings("pred3d", direction="forward")
    assert changes_between(stored, config) == []
    config = Config(prune=PruneSettings("pred3d"), data=DataSettings(last_turn_only=True))
    changes = {change.key: (str(change), change.kind) for change in changes_between(stored, config)}
    assert changes["prune.direction"] == ("prune.direction forward -> backward", "bound")


def test_a_setting_that_is_none_any_more_is_said():
    older = config_to_dict(Config()) | {"loss": {**config_to_dict(Config())["loss"], "gamma": 2.0}}
    (change,) = changes_between(older, Config())
    assert (str(change), change.kind) == ("loss.gamma 2.0 -> (no such setting)", "said")


def test_another_number_of_sources_is_said_and_left_to_the_order_of_data():
    changes = changes_between(config_to_dict(with_sources("a.jsonl")), with_sources("a.jsonl", "b.jsonl"))
    assert "data.sources.1.path (no such setting) -> b.jsonl" in map(str, changes)
    assert all(change.key.startswith("data.sources.1.") for change in changes)


# The learning rate, against the cosine written down once more.


def cosine(step: int, num_steps: int, floor: float) -> float:
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * step / (num_steps - 1)))


def state_after(step: int, num_steps: int, **more) -> RunState:
    return RunState(step=step, num_steps=num_steps, lr_factor=cosine(step - 1, num_steps, 0.1), **more)


def test_an_unchanged_schedule_goes_on_without_a_word():
    rate = LearningRate(ScheduleSettings(), 20, state_after(7, 20))
    assert rate.said == ""
    assert [rate.factor(step) for step in range(20)] == pytest.approx(
        [cosine(step, 20, 0.1) for step in range(20)], rel=1e-12
    )


def test_a_longer_schedule_follows_the_new_curve_and_says_how_far_it_jumps():
    rate = LearningRate(ScheduleSettings(), 40, state_after(20, 20))
    assert rate.factor(20) == pytest.approx(cosine(20, 40, 0.1), rel=1e-12)
    assert "20 -> 40 steps" in rate.said
    assert "was 0.1 of its peak in step 20" in rate.said
    assert f"has {cosine(20, 40, 0.1):.4g} in step 21" in rate.said
    assert "schedule.rewarm_steps=N" in rate.said


def test_a_longer_schedule_can_be_reached_on_a_line():
    settings = ScheduleSettings(rewarm_steps=4)
    rate = LearningRate(settings, 40, state_after(20, 20))
    expected = [0.1 + share / 4 * (cosine(19 + share, 40, 0.1) - 0.1) for share in (1, 2, 3, 4)]
    assert [rate.factor(step) for step in range(20, 24)] == pytest.approx(expected, rel=1e-12)
    assert rate.factor(24) == pytest.approx(cosine(24, 40, 0.1), rel=1e-12)
    # Stopped in the midst of the line: the same steps have the same rates, and nothing is said once more.
    state = replace(state_after(20, 20), step=22, **rate.state(21))
    again = LearningRate(settings, 40, state)
    assert [again.factor(step) for step in range(22, 40)] == [rate.factor(step) for step in range(22, 40)]
    assert again.said == ""


def test_a_checkpoint_of_an_earlier_version_has_no_rate_to_compare():
    old = {"step": 3, "cursor": [0, 3], "totals": {}, "num_skipped": 0, "tracker_id": "a", "order": {}, "extra": 1}
    state = RunState.from_json(old)
    assert (state.base, state.lr_factor, state.ramp, state.changes) == ("", -1.0, [], [])
    assert LearningRate(ScheduleSettings(), 9, state).said == ""


# Whole starts, as a user makes them.


@pytest.fixture(scope="module")
def three_steps(data, toy_folder, tmp_path_factory):
    """A finished run of three steps; each test works on a copy."""
    folder = tmp_path_factory.mktemp("identity")
    done = start(folder, data, toy_folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def start(folder, data, model, *more: str):
    return call("launch", "configs/debug.yaml", *arguments(data, model, folder, *more), "--ranks", "1")


def papers(run) -> dict[str, bytes]:
    files = [run / "config.yaml", run / "metrics.jsonl", run / "export" / "README.md", run / "export/pixelprune.json"]
    return {path.name: path.read_bytes() for path in files}


REFUSED = {
    "another strategy": (["prune.strategy=serpentine"], "prune.strategy pred2d -> serpentine"),
    "another size": (["resize.max_pixels=32768"], "resize.max_pixels 65536 -> 32768"),
    "adapters": (["lora.rank=4"], "lora.rank 0 -> 4"),
    "another precision": (["model.dtype=bfloat16"], "model.dtype float32 -> bfloat16"),
    "another learning rate": (["optim.lr=0.5"], "optim.lr "),
    "another threshold": (["prune.threshold=0.25"], "prune.threshold 0.0 -> 0.25"),
}


def arguments(data, model, folder, *more: str) -> list[str]:
    settings = ["schedule.max_steps=3", "checkpoint.every_steps=1", "eval.at_start=false", "data.eval_sources=[]"]
    return overrides(data, model, folder / "runs", *settings, "schedule.warmup_steps=0", *more)


def continued(folder, data, model, *more: str):
    """What a start on one rank finds in the run's folder, in this process."""
    config = load_recipe(ROOT / "configs" / "debug.yaml", arguments(data, model, folder, *more))
    ranks = Ranks(0, 1, 0, torch.device("cpu"))
    context = RunContext(config, ranks, folder / "runs" / "debug", load_model_files(config.model))
    return continuation_of(context, Checkpointer(context.folder, config.checkpoint, ranks, {}))


@pytest.mark.ranks
@pytest.mark.parametrize("name", REFUSED)
def test_a_run_that_is_another_one_is_refused(name, three_steps, data, toy_folder):
    changed, words = REFUSED[name]
    with pytest.raises(UserError, match=f"{re.escape(words)}.*another run.name"):
        continued(three_steps, data, toy_folder, "schedule.max_steps=6", *changed)
    accepts = "run.accept_changes=true"
    if kind_of(changed[0].split("=")[0]) == "asked":
        continuation = continued(three_steps, data, toy_folder, accepts, *changed)
        assert [said.startswith(f"step 3: {words}") for said in continuation.going_on.changes] == [True]
        assert continuation.state.changes == []
    else:
        with pytest.raises(UserError, match=re.escape(words)):
            continued(three_steps, data, toy_folder, accepts, *changed)


@pytest.mark.ranks
def test_a_refused_start_ends_with_one_line_and_leaves_the_papers(three_steps, data, toy_folder):
    before = papers(three_steps / "runs" / "debug")
    done = start(three_steps, data, toy_folder, "schedule.max_steps=6", "prune.strategy=serpentine")
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "prune.strategy pred2d -> serpentine" in line
    assert papers(three_steps / "runs" / "debug") == before


@pytest.mark.ranks
def test_adapters_do_not_continue_on_another_base(three_steps, data, toy_folder, tmp_path):
    """One weight of the base is another one: same names, same sizes."""
    other = shutil.copytree(toy_folder, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    name = sorted(weights)[0]
    weights[name].view(-1)[0] += 1
    save_file(
        {key: torch.clone(value) for key, value in weights.items()}, other / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(UserError, match=r"model\.path: the weights in .* are not those that .*another run\.name"):
        continued(three_steps, data, other, "schedule.max_steps=6")
    moved = shutil.copytree(toy_folder, tmp_path / "moved")
    assert continued(three_steps, data, moved).state.step == 3, "an equal copy elsewhere is the same model"


@pytest.mark.ranks
def test_a_finished_run_says_so_and_changes_nothing(three_steps, data, toy_folder):
    run = three_steps / "runs" / "debug"
    before = papers(run)
    more = ["schedule.max_steps=2", "prune.threshold=0.25", "run.accept_changes=true"]
    done = start(three_steps, data, toy_folder, *more)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "is finished: step 3 is done, 2 steps are all that the recipe asks for. Nothing is trained" in done.stderr
    assert papers(run) == before


@pytest.mark.ranks
def test_an_accepted_change_is_trained_with_and_written_down(three_steps, data, toy_folder, tmp_path):
    shutil.copytree(three_steps, tmp_path, dirs_exist_ok=True)
    changes = ["prune.threshold=0.25", "optim.lr=0.0005", "run.accept_changes=true", "tracking.project=other"]
    done = start(tmp_path, data, toy_folder, "schedule.max_steps=5", "schedule.rewarm_steps=1", *changes)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "the schedule is another one (3 -> 5 steps)" in done.stderr
    assert "tracking.project pixelprune -> other" in done.stderr
    run = tmp_path / "runs" / "debug"
    assert json.loads((run / "export" / "pixelprune.json").read_text())["prune"]["threshold"] == 0.25
    card = (run / "export" / "README.md").read_text()
    assert "step 3: prune.threshold 0.0 -> 0.25" in card
    assert "-> 0.0005" in card
    assert "threshold: 0.25" in (run / "config.yaml").read_text()
