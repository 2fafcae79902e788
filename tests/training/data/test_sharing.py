"""Loading with shared prefixes: the same records in the same steps, computed once; what is counted, what is refused."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest
import torch
from transformers import AutoConfig

from pixelprune.attention.prefixes import find_groups
from pixelprune.flops import CostModel
from pixelprune.pack import VisionGeometry, pack_samples, row_pictures
from pixelprune.records import prepare as preparing
from pixelprune.records.prepare import PrepareSettings
from pixelprune.settings import PruneSettings, ResizeSettings
from tests.samples import chat_row, draw_screen, write_jsonl
from training.config.settings import ModelSettings
from training.data.index_builder import build_index
from training.data.loader import LoaderSettings, PackLoader
from training.data.plan import PlanSettings
from training.data.settings import SourceSettings
from training.data.worker import PackDataset, PackTask
from training.errors import UserError
from training.model.sharing import SavedFlops, check_layers_of_prefix, check_sharing

NUM_SCREENS, NUM_QUESTIONS = 3, 4
PLAN = PlanSettings(samples_per_step=8, pack_tokens=400, pack_patches=1600, seed=1)


@pytest.fixture
def folder(tmp_path):
    """Three screenshots with four questions each, and a record of text."""
    for number in range(NUM_SCREENS):
        draw_screen(number).save(tmp_path / f"screen_{number}.png")
    rows = [
        chat_row(f"screen_{number}.png", f"Where is {'it, ' * question}please?", f"At ({question}, {number})")
        for number in range(NUM_SCREENS)
        for question in range(NUM_QUESTIONS)
    ]
    write_jsonl(tmp_path / "train.jsonl", [*rows, chat_row(None)])
    return tmp_path


class Setup:
    def __init__(self, folder, model_folder, **options):
        config = AutoConfig.from_pretrained(model_folder)
        self.prepare = PrepareSettings(
            str(model_folder), PruneSettings(), ResizeSettings(min_pixels=32 * 32), **options
        )
        self.geometry, self.cost = VisionGeometry.from_config(config), CostModel.from_config(config)
        sources = [SourceSettings(str(folder / "train.jsonl"))]
        self.index = build_index(sources, self.prepare, num_workers=0, show_progress=False)

    def batches(self, share: str = "", **options):
        loader = PackLoader(
            self.index,
            self.index.plan_input(self.cost),
            PLAN,
            self.prepare,
            self.geometry,
            LoaderSettings(share_prefix=share == "prefix", share_vision=share == "vision"),
            saved_flops=SavedFlops(self.cost),
            **options,
        )
        return list(loader)

    def dataset(self, share: str = "prefix") -> PackDataset:
        return PackDataset(
            self.index.sources,
            self.prepare,
            self.geometry,
            True,
            share_prefix=share == "prefix",
            share_vision=share == "vision",
        )


@pytest.fixture
def setup(folder, model_folder) -> Setup:
    return Setup(folder, model_folder)


def task_of(rows) -> PackTask:
    return PackTask(tuple((0, row, -1, 0, 0.0) for row in rows))


def flops_by_definition(cost: CostModel, pack) -> float:
    """Three forwards of what the row computes: its tokens, the pairs of query and key, its images, its labels."""
    pairs = sum(
        sum(last - first for first, last in keys) - (stop - start) + i + 1
        for (start, stop), keys in pack.borders.segments
        for i in range(stop - start)
    )
    images = [stop - start for start, stop in pairwise(pack.vit_cu_seqlens.tolist())]
    blocks = sum(images) / 4
    vision = sum(images) * (2 * cost.patch_embed + 3 * cost.vit_linear)
    vision += 3 * cost.vit_attention * sum(patches**2 for patches in images) + 3 * blocks * cost.merger
    vision += 3 * blocks * cost.deepstack
    return vision + 3 * (
        pack.num_tokens * cost.llm_linear + pairs * cost.llm_attention + pack.num_supervised * cost.head
    )


@pytest.mark.parametrize("share", ["prefix", "vision"])
@pytest.mark.parametrize("rank", [0, 1])
def test_sharing_changes_what_is_computed_and_nothing_else(setup, rank, share):
    apart, shared = (setup.batches(how, rank=rank, world_size=2) for how in ("", share))
    assert len(apart) == len(shared)
    saved = 0
    for one, other in zip(apart, shared, strict=True):
        for name in ("record_ids", "step", "micro_step", "cursor", "num_supervised", "loss_weight", "num_samples"):
            assert getattr(one, name) == getattr(other, name)
        assert torch.equal(one.pack.labels, other.pack.labels)
        assert torch.equal(one.pack.input_ids[one.pack.logit_index], other.pack.input_ids[other.pack.logit_index])
        for name in ("sample_lens", "num_kept_blocks", "num_full_blocks", "num_full_tokens"):
            assert getattr(one.pack, name) == getattr(other.pack, name)
        assert one.pack.num_shared_tokens == 0
        assert other.pack.num_tokens + other.pack.num_shared_tokens == one.pack.num_tokens
        saved += other.pack.num_shared_tokens + len(other.pack.repeated_images)
        if share == "vision":
            assert torch.equal(one.pack.input_ids, other.pack.input_ids)
            assert one.pack.num_patches - 4 * sum(other.pack.repeated_images) == other.pack.num_patches
        for batch in (one, other):
            if "dummy" not in batch.record_ids:
                assert batch.flops == pytest.approx(flops_by_definition(setup.cost, batch.pack), rel=1e-12)
    assert saved > 0


def test_a_picture_of_many_records_is_prepared_once_in_a_pack(setup, monkeypatch):
    calls = []

    def counted(*args, **options):
        calls.append(args)
        return prune_shots(*args, **options)

    prune_shots = preparing.prune_shots
    monkeypatch.setattr(preparing, "prune_shots", counted)
    rows = [0, 4, 1, 5, 2, 12]
    for share, encoded in (("prefix", 2), ("vision", 2), ("", 5)):
        calls.clear()
        pack = setup.dataset(share)[task_of(rows)].pack
        assert len(calls) == 2, "two screenshots in six records"
        assert len(pack.vit_cu_seqlens) - 1 == encoded


def test_a_group_whose_first_record_went_bad_keeps_its_picture(setup):
    dataset = setup.dataset()
    wrong_hash = (0, 0, 1, 5, 5.0)
    result = dataset[PackTask((wrong_hash, *task_of([1, 2, 3]).records))]
    assert [entry.reason for entry in result.lost] == ["changed"]
    expected = dataset[task_of([1, 2, 3])].pack
    assert torch.equal(result.pack.input_ids, expected.input_ids)
    assert torch.equal(result.pack.blocks, expected.blocks)
    assert result.pack.num_shared_tokens > 0


@pytest.mark.parametrize("share", ["prefix", "vision"])
@pytest.mark.parametrize("prune", [PruneSettings(), PruneSettings(threshold=0.1)])
def test_the_teachers_row_shares_the_same_and_sees_its_own_pixels(folder, model_folder, prune, share):
    setup = Setup(folder, model_folder, with_full=True)
    setup.prepare = dataclasses.replace(setup.prepare, prune=prune)
    rows = [0, 4, 1, 5, 2, 12]
    pack = setup.dataset(share)[task_of(rows)].pack
    full = pack.full_pack()
    unpruned = dataclasses.replace(setup.prepare, prune=PruneSettings(strategy="none"), with_full=False)
    preparer, source = unpruned.build(), setup.index.sources[0]
    samples = [preparer.prepare(source.rows[row], source.root, record_id=f"train:{row}").sample for row in rows]
    groups = find_groups(samples, setup.geometry.image_token_id) if share == "prefix" else None
    pictures = row_pictures(samples) if share == "vision" else None
    expected = pack_samples(samples, setup.geometry, groups, pictures=pictures)
    assert (full.shared, full.image_order) == (expected.shared, expected.image_order)
    assert full.shared or full.image_order
    assert full.borders == expected.borders
    assert torch.equal(full.input_ids, expected.input_ids)
    assert torch.equal(full.logit_index, expected.logit_index)
    blocks = full.blocks if full.block_index is None else full.blocks[full.block_index]
    assert torch.equal(blocks, expected.blocks)
    saved = SavedFlops(setup.cost, setup.cost)(pack) - SavedFlops(setup.cost)(pack)
    assert saved > 0, "of the teacher's forward"


def test_attention_without_borders_is_refused_by_name():
    config = type("Config", (), {"model_type": "qwen3_vl"})()
    for attention in ("flash_attention_2", "flash_attention_3"):
        with pytest.raises(UserError, match=rf"model.attention={attention} gives.*set model.attention=varlen or sdpa"):
            check_sharing("step", config, attention)
        check_sharing("off", config, attention)
    for attention in ("sdpa", "eager", "varlen"):
        check_sharing("step", config, attention)


def test_what_would_lose_a_hybrids_state_is_refused_by_name():
    hybrid, dense = (type("Config", (), {"model_type": name})() for name in ("qwen3_5", "qwen3_vl"))
    plain = ModelSettings(recompute_llm=0)
    with pytest.raises(UserError, match=r"kd.sharding=zero3.*set kd.sharding=replica"):
        check_sharing("step", hybrid, "sdpa", is_sharded=True)
    check_sharing("step", dense, "sdpa", is_sharded=True)
    lost = {"recompute_llm=2": {"recompute_llm": 2}, "compile=true": {"compile": True}}
    for said, settings in lost.items():
        model = dataclasses.replace(plain, **settings)
        with pytest.raises(UserError, match=rf"with model.{said} they would lose it.*data.share_vision=group"):
            check_layers_of_prefix("group", hybrid, model)
        check_layers_of_prefix("off", hybrid, model)
        check_layers_of_prefix("group", dense, model)
    check_layers_of_prefix("group", hybrid, plain)
