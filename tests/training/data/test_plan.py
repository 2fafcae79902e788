"""The plan's promises: every sample as often as its weight says, the same steps on any number of ranks."""

import dataclasses
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from training.data.plan import PlanInput, PlanSettings, draw_copies, epoch_order, num_steps, plan_epoch

SETTINGS = PlanSettings(samples_per_step=32, pack_tokens=500, pack_patches=2000, seed=3)


def make_input(num=500, copies=1.0, num_sources=1, seed=0) -> PlanInput:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(5, 400, num)
    return PlanInput(
        tokens=tokens,
        patches=np.where(rng.random(num) < 0.3, 0, 4 * rng.integers(1, 300, num)),
        cost=tokens + 1e-3 * tokens.astype(float) ** 2,
        num_supervised=rng.integers(1, 20, num),
        loss_weight=rng.random(num),
        copies=np.broadcast_to(np.asarray(copies, dtype=float), (num,)).copy(),
        source=np.arange(num) % num_sources,
    )


@pytest.mark.parametrize("world_size", [1, 2, 7, 64])
def test_every_sample_exactly_once_within_the_caps(world_size):
    inputs = make_input()
    plan = plan_epoch(inputs, SETTINGS, epoch=0, world_size=world_size)
    seen = Counter()
    for number, step in enumerate(plan):
        packs = [pack for micro in step.micro_steps for pack in micro]
        assert len(step.micro_steps) == step.num_micro_steps
        assert all(len(micro) == world_size for micro in step.micro_steps)
        assert all(inputs.tokens[pack].sum() <= SETTINGS.pack_tokens for pack in packs)
        assert all(inputs.patches[pack].sum() <= SETTINGS.pack_patches for pack in packs)
        rows = np.concatenate(packs)
        assert step.num_samples == len(rows) == (32 if number < len(plan) - 1 else 500 % 32)
        assert step.num_supervised == inputs.num_supervised[rows].sum()
        assert step.loss_weight == pytest.approx(inputs.loss_weight[rows].sum(), rel=1e-12), "the order may differ"
        expected = [[inputs.cost[pack].sum() for pack in micro] for micro in step.micro_steps]
        np.testing.assert_allclose(step.cost, expected)
        seen.update(rows.tolist())
    assert seen == Counter(range(500))
    assert len(plan) == 16 == num_steps(inputs, SETTINGS, 0)


def test_steps_do_not_depend_on_the_number_of_ranks_or_the_caps():
    inputs = make_input()
    one = plan_epoch(inputs, SETTINGS, epoch=2, world_size=1)
    for world_size, tokens in ((4, 500), (4, 5000), (13, 700)):
        other = plan_epoch(inputs, dataclasses.replace(SETTINGS, pack_tokens=tokens), epoch=2, world_size=world_size)
        assert [step.rows.tolist() for step in one] == [step.rows.tolist() for step in other]


def test_order_depends_on_seed_and_epoch_only():
    inputs = make_input()
    orders = [epoch_order(inputs, seed=s, epoch=e).tolist() for s, e in ((0, 0), (0, 1), (1, 0), (0, 0))]
    assert orders[0] == orders[3]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert epoch_order(inputs, seed=0, epoch=0, shuffle=False).tolist() == list(range(500))


def test_whole_weights_are_exact_copies():
    inputs = make_input(copies=np.where(np.arange(500) % 2, 3.0, 0.0))
    copies = draw_copies(inputs, seed=0, epoch=5)
    assert copies.tolist() == [3 * (i % 2) for i in range(500)]


@pytest.mark.parametrize("denominator", [2, 3, 4, 10])
def test_a_fraction_is_used_up_exactly_once_in_its_epochs(denominator):
    inputs = make_input(num=997, copies=1 / denominator)
    epochs = [draw_copies(inputs, seed=1, epoch=epoch) for epoch in range(denominator)]
    assert sum(epochs).tolist() == [1] * 997
    assert all(abs(epoch.sum() - 997 / denominator) < 1 for epoch in epochs)


def test_mixed_weights_keep_their_shares_over_many_epochs():
    rng = np.random.default_rng(0)
    weights = rng.uniform(0, 2.5, 3)
    inputs = make_input(num=600, num_sources=3)
    inputs = dataclasses.replace(inputs, copies=weights[inputs.source])
    epochs = np.array([draw_copies(inputs, seed=1, epoch=epoch) for epoch in range(40)])
    assert np.all((epochs == np.floor(inputs.copies)) | (epochs == np.floor(inputs.copies) + 1))
    assert np.all(np.abs(epochs.sum(axis=0) - 40 * inputs.copies) <= 1 + 1e-6)
    for source, weight in enumerate(weights):
        per_epoch = epochs[:, inputs.source == source].sum(axis=1)
        assert np.all(np.abs(per_epoch - 200 * weight) < 1 + 1e-6)


def test_subset_differs_between_seeds():
    inputs = make_input(copies=0.5)
    assert draw_copies(inputs, seed=0, epoch=0).tolist() != draw_copies(inputs, seed=1, epoch=0).tolist()


def test_nothing_left_by_the_weights_is_an_error():
    with pytest.raises(ValueError, match="no sample"):
        plan_epoch(make_input(copies=0.0), SETTINGS, epoch=0, world_size=1)
    with pytest.raises(ValueError, match=r"data\.samples_per_step"):
        PlanSettings(samples_per_step=0, pack_tokens=1, pack_patches=1)


def test_plan_needs_no_torch():
    code = "import sys, training.data.plan; assert 'torch' not in sys.modules, 'torch was imported'"
    subprocess.run([sys.executable, "-c", code], check=True)
