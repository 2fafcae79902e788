"""Plans over screenshots: who meets in a step, what a pack of shared prefixes weighs, and that nothing gets longer."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from tests.samples import chat_row, write_jsonl
from tests.training.data.test_loader import same_pack
from tests.training.data.test_sharing import PLAN as SMALL_PLAN
from tests.training.data.test_sharing import Setup, flops_by_definition, folder  # noqa: F401
from training.data.balance import Caps, PrefixColumns, pack_groups, pack_step
from training.data.loader import LoaderSettings, PackLoader
from training.data.plan import PlanInput, PlanSettings, plan_epoch
from training.data.settings import DataSettings
from training.model.sharing import SavedFlops, describe_sharing

NO_CAP = 2**40


def records(num_groups: int, per_group: int, *, suffix: int = 60, prefix: int = 600, copies=1.0, seed=0) -> PlanInput:
    """Groups of records that differ in their suffixes' lengths; cost counts tokens."""
    rng = np.random.default_rng(seed)
    group = np.repeat(np.arange(num_groups), per_group)
    prefixes = np.repeat(rng.integers(prefix // 2, prefix * 2, num_groups), per_group)
    tokens = prefixes + rng.integers(suffix // 2, suffix * 2, len(group))
    num = np.full(len(group), 5)
    return PlanInput(
        tokens=tokens,
        patches=4 * prefixes,
        cost=tokens.astype(float),
        num_supervised=num,
        loss_weight=num.astype(float),
        copies=np.broadcast_to(copies, len(group)).astype(float),
        source=np.zeros(len(group), dtype=int),
        prefixes=PrefixColumns(group, prefixes, 4 * prefixes, prefixes.astype(float)),
    )


def settings(**options) -> PlanSettings:
    given = {"samples_per_step": 64, "pack_tokens": NO_CAP, "pack_patches": NO_CAP, "max_shared": 16}
    return PlanSettings(**(given | options))


def test_every_record_is_used_as_often_as_its_weight_says_and_epochs_differ():
    inputs = records(40, 9, copies=np.tile([1, 2, 0.5], 120))
    plans = [plan_epoch(inputs, settings(), epoch=epoch, world_size=2) for epoch in (0, 1)]
    for plan in plans:
        counts = Counter(plan.order.tolist())
        assert all(counts[row] == 1 for row in range(0, 360, 3))
        assert all(counts[row] == 2 for row in range(1, 360, 3))
        assert sum(counts[row] for row in range(2, 360, 3)) == 60
    assert not np.array_equal(plans[0].order, plans[1].order)
    again = plan_epoch(inputs, settings(), epoch=0, world_size=7)
    assert np.array_equal(again.order, plans[0].order), "the order knows nothing of ranks"


@pytest.mark.parametrize("max_shared", [2, 4, 16])
def test_questions_of_one_screenshot_follow_each_other_up_to_a_bound(max_shared):
    inputs = records(40, 9)
    order = plan_epoch(inputs, settings(max_shared=max_shared), epoch=0, world_size=1).order
    edges = np.flatnonzero(np.diff(inputs.prefixes.group[order], prepend=-1))
    runs = Counter(stop - start for start, stop in pairwise([*edges, len(order)]))
    assert max(runs) <= max_shared
    expected = {2: (2, 4 * 40), 4: (4, 2 * 40), 16: (9, 40)}[max_shared]
    assert runs[expected[0]] == expected[1], "as many as fit, every time"


def test_uses_of_one_record_and_parts_of_a_cut_group_do_not_meet_in_a_step():
    inputs = records(40, 9, copies=3.0)
    plan = plan_epoch(inputs, settings(max_shared=4), epoch=0, world_size=1)
    last = len(plan) - 2  # at the end nothing else may be left
    for step in range(last):
        rows = plan.rows_of_step(step)
        assert max(Counter(rows.tolist()).values()) == 1
        assert max(Counter(inputs.prefixes.group[rows].tolist()).values()) <= 4


def test_without_shuffling_screenshots_come_in_the_order_of_the_files():
    inputs = records(5, 4)
    mixed = PlanInput(**{**vars(inputs), "prefixes": PrefixColumns(np.arange(20) % 5, *inputs.prefixes[1:])})
    order = plan_epoch(mixed, settings(shuffle=False), epoch=0, world_size=1).order
    assert order.tolist() == [row for screen in range(5) for row in range(screen, 20, 5)]


def weights_of(packs, inputs: PlanInput) -> tuple[list[int], list[float]]:
    """Tokens and cost of packs in which every group has its prefix once."""
    tokens, costs = [], []
    for rows in packs:
        saved = sum(
            (count - 1) * inputs.prefixes.tokens[rows[inputs.prefixes.group[rows] == number][0]]
            for number, count in Counter(inputs.prefixes.group[rows].tolist()).items()
        )
        tokens.append(int(inputs.tokens[rows].sum() - saved))
        costs.append(float(inputs.cost[rows].sum() - saved))
    return tokens, costs


@pytest.mark.parametrize("world_size", [1, 2, 8, 64, 256])
@pytest.mark.parametrize("cap", [NO_CAP, 4000])
def test_a_step_is_never_longer_than_with_samples_apart_and_packs_hold_their_caps(world_size, cap):
    inputs = records(7, 9, seed=3)
    planned = plan_epoch(inputs, settings(pack_tokens=cap), epoch=0, world_size=world_size)[0]
    apart = plan_epoch(inputs, settings(pack_tokens=cap, max_shared=0), epoch=0, world_size=world_size)[0]
    assert planned.cost.max(axis=1).sum() <= apart.cost.max(axis=1).sum() * (1 + 1e-9)
    packs = [rows for micro_step in planned.micro_steps for rows in micro_step if len(rows)]
    assert sorted(row for rows in packs for row in rows.tolist()) == list(range(63))
    tokens, costs = weights_of(packs, inputs)
    assert max(tokens) <= cap
    # Pieces of one group that meet in a pack weigh less than planned, never more.
    assert max(costs) <= planned.cost.max() * (1 + 1e-9)
    assert planned.apart_cost.sum() == pytest.approx(inputs.cost.sum())


def test_the_gain_is_what_the_ranks_leave_of_it():
    """63 questions about 7 screenshots: all of it on one rank, none where every rank has one question."""
    inputs = records(7, 9, seed=3)
    gains = {}
    for world_size in (1, 8, 63):
        shared, apart = (
            plan_epoch(inputs, settings(max_shared=bound), epoch=0, world_size=world_size)[0].cost.max(axis=1).sum()
            for bound in (16, 0)
        )
        gains[world_size] = apart / shared
    (_, (whole,)) = weights_of([np.arange(63)], inputs)
    assert gains[1] == pytest.approx(inputs.cost.sum() / whole)
    assert 1 < gains[8] < gains[1]
    assert gains[63] == pytest.approx(1)


def test_a_prefix_that_saves_little_is_planned_as_it_is_packed():
    """Below the share that `find_groups` asks for, samples stay apart, and caps count them so."""
    tokens, ones = np.array([1000, 1000]), np.ones(2)
    prefixes = PrefixColumns(np.zeros(2, dtype=int), np.array([100, 100]), np.array([0, 0]), 100 * ones)
    caps = Caps(1, 1950, NO_CAP)
    bins, num_micro, loads = pack_groups(tokens, 0 * tokens, tokens.astype(float), prefixes, caps)
    assert num_micro == 2
    assert loads.sum() == 2000
    assert len(set(bins.tolist())) == 2
    assert pack_step(tokens - 50, 0 * tokens, ones, **caps._asdict())[1] == 1, "the cap would hold both if shared"


@pytest.fixture
def setup(folder, model_folder) -> Setup:  # noqa: F811
    return Setup(folder, model_folder)


def loader(setup: Setup, over: str = "prefix", **options) -> PackLoader:
    plan = PlanSettings(**{**vars(SMALL_PLAN), "max_shared": 4, "over_pictures": over == "vision"})
    return PackLoader(
        setup.index,
        setup.index.plan_input(setup.cost),
        plan,
        setup.prepare,
        setup.geometry,
        LoaderSettings(**{f"share_{over}": True}),
        saved_flops=SavedFlops(setup.cost),
        **options,
    )


def test_the_index_knows_which_records_begin_alike(setup):
    hashes = setup.index.prefix_hash.reshape(-1)
    assert [len(set(hashes[first : first + 4].tolist())) for first in (0, 4, 8)] == [1, 1, 1]
    assert len(set(hashes.tolist())) == 4
    assert (hashes[12], setup.index.prefix_text[12]) == (0, 0), "text alone"
    group = setup.index.plan_input(setup.cost).prefixes.group
    assert Counter(Counter(group.tolist()).values()) == {4: 3, 1: 1}


def test_the_start_of_a_run_says_what_there_is_to_share(setup):
    inputs = setup.index.plan_input(setup.cost)
    saved = sum(3 * int(inputs.prefixes.tokens[row]) for row in (0, 4, 8)) / int(inputs.tokens.sum())
    said = describe_sharing(DataSettings(share_vision="step"), inputs)
    assert said == (
        f"prefix off, 12 records have 3 beginnings up to their first image: {saved:.0%} fewer tokens if each of these "
        "were computed once; vision step, 12 records have 3 first images: 75% fewer ViT patches if each of these were "
        "computed once"
    )
    assert 0.2 < saved < 0.9
    alone = PlanInput(**{**vars(inputs), "prefixes": PrefixColumns(np.arange(13), *inputs.prefixes[1:])})
    assert describe_sharing(DataSettings(share_prefix="step"), alone).startswith("prefix step, no two records share")


@pytest.mark.parametrize("over", ["prefix", "vision"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_the_loader_shares_what_the_plan_let_meet(setup, world_size, over):
    batches = [b for rank in range(world_size) for b in loader(setup, over, rank=rank, world_size=world_size)]
    seen = Counter(record for batch in batches for record in batch.record_ids if record != "dummy")
    assert seen == Counter(f"train:{row}" for row in range(13))
    for batch in batches:
        if "dummy" not in batch.record_ids:
            assert batch.flops == pytest.approx(flops_by_definition(setup.cost, batch.pack), rel=1e-12)
    assert (sum(batch.pack.num_shared_tokens for batch in batches) > 0) == (over == "prefix")
    assert (sum(len(batch.pack.repeated_images) for batch in batches) > 0) == (over == "vision")


def test_a_plan_over_pictures_weighs_what_its_rows_compute(setup):
    plan = plan_epoch(setup.index.plan_input(setup.cost), loader(setup, "vision").plan_settings, epoch=0, world_size=1)
    costs = [cost for step in plan for cost in step.cost[:, 0].tolist()]
    for cost, batch in zip(costs, loader(setup, "vision"), strict=True):
        if "dummy" not in batch.record_ids:
            assert batch.flops == pytest.approx(cost, rel=1e-12)


def test_records_of_one_picture_are_known_whatever_stands_before_it(folder, model_folder):  # noqa: F811
    rows = [chat_row(f"screen_{number % 2}.png", f"Where is number {number}?") for number in range(4)]
    for number, row in enumerate(rows):
        row["messages"].insert(0, {"role": "system", "content": f"You are model {number}."})
    write_jsonl(folder / "train.jsonl", rows)
    index = Setup(folder, model_folder).index
    assert len(set(index.prefix_hash.tolist())) == 4
    assert index.picture_hash[:2].tolist() == index.picture_hash[2:].tolist()
    assert len(set(index.picture_hash.tolist())) == 2


@pytest.mark.parametrize("over", ["prefix", "vision"])
def test_resumed_packs_are_bit_equal(setup, over):
    whole = list(loader(setup, over, num_steps=4))
    for stop in range(1, len(whole)):
        rest = list(loader(setup, over, cursor=whole[stop - 1].cursor, num_steps=4))
        expected = [batch for batch in whole if batch.step >= rest[0].step]
        assert len(rest) == len(expected)
        for one, other in zip(rest, expected, strict=True):
            same_pack(one.pack, other.pack)
