"""The parts of the step and scaling benchmarks that can be wrong in silence, against values worked out by hand."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks.parts.network import Network, exposed_seconds
from benchmarks.parts.shapes import random_model, shape_config
from benchmarks.parts.step_profile import PARTS, operations_by_part, profile_step
from benchmarks.parts.step_ways import executed_flops, recomputed_shares
from benchmarks.plan import draw
from benchmarks.scaling import Fleet, Gradients, simulate, step_time
from pixelprune.flops import CostModel
from pixelprune.pack import VisionGeometry, pack_samples
from tests.conftest import screen
from tests.pixelprune.reference import make_sample
from training.composition.toy import build_tokenizer
from training.config.settings import ModelSettings
from training.loss.supervised import LossSettings
from training.model.loading import enable_recomputation
from training.model.supervised import SupervisedModel

NO_LATENCY = Network(100e9, 50e9, 0.0, 0.0, ranks_per_node=8, reached=1.0)
NOTHING = Gradients(0.0, 0.0, 0.0, 1.0)


def test_a_ring_inside_a_node_moves_all_but_one_part_over_a_rank_s_link():
    assert NO_LATENCY.ring_seconds(8e9, 4) == pytest.approx(3 / 4 * 8 / 100)


def test_a_ring_over_nodes_is_as_slow_as_a_node_s_border():
    assert NO_LATENCY.ring_seconds(8e9, 16) == pytest.approx(15 / 16 * 8 / 50)


def test_reached_bandwidth_and_latency_of_every_hop_count():
    network = Network(100e9, 50e9, 2e-6, 6e-6, ranks_per_node=8, reached=0.5)
    assert network.ring_seconds(0, 8) == pytest.approx(7 * 2e-6)
    # 16 links, 2 of them between the nodes; of 15 hops 15 * 2 / 16 cross.
    assert network.ring_seconds(0, 16) == pytest.approx(1.875 * 6e-6 + 13.125 * 2e-6)
    assert network.ring_seconds(8e9, 2) - network.ring_seconds(0, 2) == pytest.approx(1 / 2 * 8 / 50)


def test_one_rank_moves_nothing():
    assert Network().ring_seconds(1e12, 1) == 0


@pytest.mark.parametrize(
    ("bucket_s", "exposed"),
    [(0.5, 0.5), (1.0, 1.0), (2.0, 5.0)],
    ids=["only the last bucket is seen", "just kept up with", "the queue grows by a second a bucket"],
)
def test_backward_hides_all_but_what_comes_after_it(bucket_s, exposed):
    """Four buckets over four seconds of backward: filled at 1, 2, 3 and 4 s."""
    assert exposed_seconds([bucket_s] * 4, [1.0, 2.0, 3.0, 4.0]) == pytest.approx(exposed)


def test_a_full_bucket_waits_for_the_reduction_before_it_however_long_the_rest_takes():
    """The first is reduced from 1 to 4 s; the second, full at 2 s, waits: 2 s lost, though 8 s of backward follow."""
    assert exposed_seconds([3.0, 3.0, 0.5], [1.0, 2.0, 10.0]) == pytest.approx(2.0 + 0.5)


def test_gradients_come_in_the_order_of_backward(toy):
    gradients = Gradients(llm=300.0, vision=100.0, embeddings=50.0, bucket=200.0)
    assert gradients.buckets(vision_share=0.6) == [(150.0, 0.2), (150.0, 0.4), (100.0, 1.0), (50.0, 1.0)]
    found = Gradients.of(toy, 200)
    assert found.total == sum(parameter.numel() for parameter in toy.parameters())
    assert found.embeddings == toy.lm_head.weight.numel(), "tied"
    assert found.vision == sum(parameter.numel() for parameter in toy.model.visual.parameters())


def test_a_bucket_is_all_reduced_in_every_micro_step():
    """16 ranks on two nodes: 15/16 of 50 GB/s, twice for the all-reduce; 2 GB of gradients come at the end."""
    fleet = Fleet(1.0, update_bytes_per_weight=0.0, loader_s_per_sample=0.0)
    only_at_the_end = Gradients(0.0, 0.0, 1e9, 1e9)
    packs = np.ones((3, 16))
    one_pass = 15 / 16 * 2 / 50
    time = step_time(packs, 48, only_at_the_end, 0.5, fleet, NO_LATENCY)
    assert time.communication == pytest.approx(3 * 2 * one_pass + one_pass), "three all-reduces, one all-gather"


def test_waits_are_split_into_imbalance_and_the_ragged_last_micro_step():
    fleet = Fleet(flops_per_s=1.0, memory_bytes_per_s=1.0, update_bytes_per_weight=0.0, loader_s_per_sample=0.0)
    cost = np.array([[4.0, 2.0], [3.0, 3.0], [1.0, 0.0]])
    time = step_time(cost, 5, NOTHING, 0.5, fleet, NO_LATENCY)
    assert (time.compute, time.imbalance, time.ragged) == pytest.approx((6.5, 1.0, 0.5))
    assert time.communication == time.optimizer == time.data == 0
    assert time.total == pytest.approx(8.0)


def test_a_loader_slower_than_the_step_is_waited_for():
    fleet = Fleet(1.0, memory_bytes_per_s=1.0, update_bytes_per_weight=0.0, loader_s_per_sample=1.0, loader_workers=2)
    assert step_time(np.array([[3.0, 3.0]]), 16, NOTHING, 0.5, fleet, NO_LATENCY).data == pytest.approx(
        16 / 2 * 1.0 / 2 - 3
    )


def test_equal_packs_without_communication_lose_nothing():
    """32 equal samples on 4 ranks: every pack the same, so the efficiency is 1."""
    one = draw("screens", 1)
    equal = type(one)(*(np.repeat(getattr(one, name), 32) for name in type(one).__annotations__))
    fleet = Fleet(update_bytes_per_weight=0.0, loader_s_per_sample=0.0)
    cost = CostModel.from_config(shape_config("2b"))
    time = simulate(equal, cost, 4, 32, NOTHING, fleet, NO_LATENCY)
    assert time.compute / time.total == pytest.approx(1.0)
    assert time.unavoidable == pytest.approx(0.0, abs=1e-12)


@pytest.fixture(scope="module")
def toy():
    return random_model("toy", device=torch.device("cpu"), dtype=torch.float32)


def one_record(kept: int, text: int, supervised: int) -> SimpleNamespace:
    """What `executed_flops` reads of an index: one record with one image."""

    class Index(SimpleNamespace):
        def __len__(self) -> int:
            return 1

    return Index(
        image_starts=np.array([0, 1]),
        kept_blocks=np.array([kept]),
        text_tokens=np.array([text]),
        num_supervised=np.array([supervised]),
    )


def test_executed_flops_count_matrix_products_of_every_pass_by_hand():
    """The toy's products written out: layers four times (forward, recomputed, two in backward), the rest three times,
    the patch embedding, which has no gradient to its input, twice."""
    kept, text, supervised = 10, 7, 3
    patches, tokens = 4 * kept, kept + text
    vit_layer = patches * 2 * (4 * 128 * 128 + 2 * 128 * 384) + 4 * 128 * patches**2
    llm_layer = tokens * 2 * (192 * 32 * (6 + 2 + 2 + 6) + 3 * 192 * 512) + 4 * 6 * 32 * tokens * (tokens + 1) / 2
    merger = kept * 2 * 512 * (512 + 192)
    head = supervised * 2 * 192 * shape_config("toy").text_config.vocab_size
    embedding = patches * 2 * (3 * 2 * 256) * 128
    cost = CostModel.from_config(shape_config("toy"))
    (all_twice,) = executed_flops(cost, one_record(kept, text, supervised), (1.0, 1.0))
    assert all_twice == pytest.approx(4 * 4 * (vit_layer + llm_layer) + 3 * (4 * merger + head) + 2 * embedding)
    (half_vit,) = executed_flops(cost, one_record(kept, text, supervised), (0.5, 0.0))
    assert half_vit == pytest.approx(4 * 3.5 * vit_layer + 4 * 3 * llm_layer + 3 * (4 * merger + head) + 2 * embedding)


@pytest.mark.parametrize(("vit", "llm", "shares"), [(0, 0, (0.0, 0.0)), (1, 2, (1.0, 0.5)), (3, 1, (0.5, 1.0))])
def test_recomputed_shares_are_those_of_the_model_s_layers(vit, llm, shares):
    model = random_model("toy", device=torch.device("meta"), dtype=torch.float32)
    enable_recomputation(model, ModelSettings(recompute_vit=vit, recompute_llm=llm))
    assert recomputed_shares(model) == shares


@pytest.fixture(scope="module")
def trained(toy):
    """A module, and a forward and backward of two packed samples with three images, every layer recomputed."""
    geometry = VisionGeometry.from_config(toy.config)
    tokenizer = build_tokenizer()
    images = [[screen(8, 8, 0), screen(6, 8, 1)], [screen(8, 8, 2)]]
    samples = [make_sample(tokenizer, some, "Where?", "(1, 2)", name=str(len(some))) for some in images]
    pack = pack_samples(samples, geometry)
    enable_recomputation(toy, ModelSettings(recompute_vit=1, recompute_llm=1))
    module = SupervisedModel(toy, geometry, LossSettings()).train()
    return module, lambda: module(pack).total.backward()


def test_backward_and_recomputation_are_counted_with_the_part_whose_forward_they_belong_to(trained):
    """Four layers each; the ViT attends in every image by itself, the language model in every sample."""
    count: Counter[tuple[str, str]] = Counter()
    for operation, part in operations_by_part(*trained):
        if operation.name.startswith("aten::_scaled_dot_product"):
            count["backward" if "backward" in operation.name else "forward", part] += 1
    assert count == {
        ("forward", "ViT attention"): 2 * 4 * 3,
        ("backward", "ViT attention"): 4 * 3,
        ("forward", "LLM attention"): 2 * 4 * 2,
        ("backward", "LLM attention"): 4 * 2,
    }


def test_a_profile_has_all_parts_of_the_model_and_leaves_its_hooks_as_they_were(trained):
    module, step = trained
    before = [(len(part._forward_pre_hooks), len(part._forward_hooks)) for part in module.modules()]
    seconds = profile_step(module, step)
    assert before == [(len(part._forward_pre_hooks), len(part._forward_hooks)) for part in module.modules()]
    assert set(seconds) == set(PARTS)
    assert seconds["data wait"] == 0
    parts = ("copy, normalise", "ViT attention", "ViT MLP, norms", "merger", "LLM attention", "LLM MLP, norms")
    assert all(seconds[part] > 0 for part in (*parts, "head + loss"))
