"""A pack and its teacher's side: the teacher's pixels are the originals, its targets belong to the same tokens."""

from __future__ import annotations

import dataclasses
import pickle
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from pixelprune.images.image import decode_image, resize_image
from pixelprune.pack import VisionGeometry, pack_samples
from pixelprune.records.prepare import Preparer, PrepareSettings
from pixelprune.settings import PruneSettings, ResizeSettings
from tests.samples import chat_row
from tests.training.data.test_loader import Sums
from training.data.distillation import AlignmentError, DistillationPack, supervised_ids, with_full_rows
from training.data.index_builder import build_index
from training.data.loader import LoaderSettings, PackLoader
from training.data.plan import PlanSettings, plan_epoch
from training.data.settings import SourceSettings
from training.data.targets import TargetEntry, TargetReader, write_shard
from training.data.worker import PackDataset, PackTask
from training.errors import RankError, UserError

SAMPLE_IMAGES = sorted(Path("data_tools/samples/images").glob("*.png"))
SMALL = ResizeSettings(min_pixels=32 * 32)


@pytest.fixture(scope="session")
def geometry(model_folder) -> VisionGeometry:
    from transformers import AutoConfig

    return VisionGeometry.from_config(AutoConfig.from_pretrained(model_folder))


def blocks_of_picture(path: Path, resize: ResizeSettings) -> torch.Tensor:
    """The blocks of the resized picture, cut one by one in row-major order: uint8 (n, 32, 32, 3)."""
    pixels = resize_image(decode_image(path, resize), resize)
    rows, cols = pixels.shape[0] // 32, pixels.shape[1] // 32
    cut = [pixels[32 * r : 32 * r + 32, 32 * c : 32 * c + 32] for r in range(rows) for c in range(cols)]
    return torch.from_numpy(np.stack(cut))


def distillation_pack(
    preparer: Preparer, geometry: VisionGeometry, rows: list[dict], root: Path, decode: bool
) -> DistillationPack:
    records = [preparer.prepare(row, root, record_id=f"r{i}") for i, row in enumerate(rows)]
    samples, fulls = [record.sample for record in records], [record.full for record in records]

    return with_full_rows(pack_samples(samples, geometry), samples, fulls, geometry, decode=decode)


def teacher_blocks(pack: DistillationPack) -> torch.Tensor:
    """What feeds the teacher's vision tower."""
    full = pack.full_pack()
    return full.blocks if full.block_index is None else full.blocks[full.block_index]


@pytest.mark.parametrize("path", SAMPLE_IMAGES, ids=lambda path: path.stem)
def test_decoded_pixels_are_the_originals_on_every_sample_screenshot(path, preparer, geometry):
    preparer = dataclasses.replace(preparer, with_full=True)
    pack = distillation_pack(preparer, geometry, [chat_row(path.name)], path.parent, decode=True)
    # An empty view would take all of its storage through a worker's shared memory.
    assert pack.full.blocks.untyped_storage().nbytes() == 0, "no pixel travels twice"
    assert pack.num_kept_blocks < pack.full.num_kept_blocks, "something was pruned"
    assert torch.equal(teacher_blocks(pack), blocks_of_picture(path, preparer.resize))


@pytest.mark.parametrize("strategy", ["none", "raster", "serpentine", "pred2d"])
def test_decoding_is_exact_for_every_recoverable_strategy_and_several_images_in_a_row(
    strategy, preparer, geometry, screens
):
    preparer = dataclasses.replace(preparer, prune=PruneSettings(strategy=strategy), with_full=True)
    rows = [chat_row("screen_0.png"), chat_row(None), chat_row("screen_1.png"), chat_row("screen_4.png")]
    pack = distillation_pack(preparer, geometry, rows, screens, decode=True)
    expected = [blocks_of_picture(screens / f"screen_{i}.png", preparer.resize) for i in (0, 1, 4)]
    assert torch.equal(teacher_blocks(pack), torch.cat(expected))


@pytest.mark.parametrize(
    "prune", [PruneSettings(threshold=0.1), PruneSettings(strategy="random"), PruneSettings(strategy="conncomp")]
)
def test_where_pixels_are_lost_the_originals_travel(prune, screens, model_folder, geometry):
    prepare = PrepareSettings(str(model_folder), prune, SMALL, with_full=True)
    index = build_index([SourceSettings(str(screens / "train.jsonl"))], prepare, num_workers=0, show_progress=False)
    dataset = PackDataset(index.sources, prepare, geometry, dummy_image=True)
    pack = dataset[PackTask(((0, 0, -1, 0, 0.0), (0, 1, -1, 0, 0.0)))].pack
    expected = [blocks_of_picture(screens / f"screen_{i}.png", SMALL) for i in (0, 1)]
    assert pack.full.block_index is None
    assert torch.equal(teacher_blocks(pack), torch.cat(expected))


def test_the_full_row_is_the_pack_of_a_run_without_pruning(screens, model_folder, geometry):
    sources = [SourceSettings(str(screens / "train.jsonl"))]
    task = PackTask(tuple((0, row, -1, 0, 0.0) for row in (0, 2, 3)))
    pruned = PrepareSettings(str(model_folder), PruneSettings(), SMALL, with_full=True)
    unpruned = PrepareSettings(str(model_folder), PruneSettings(strategy="none"), SMALL)
    opened = build_index(sources, pruned, num_workers=0, show_progress=False).sources
    pack = PackDataset(opened, pruned, geometry, dummy_image=True)[task].pack
    stock = PackDataset(opened, unpruned, geometry, dummy_image=True)[task].pack
    full = pack.full_pack()
    for field in dataclasses.fields(stock):
        mine, other = getattr(full, field.name), getattr(stock, field.name)
        if field.name in ("blocks", "block_index"):
            continue
        assert torch.equal(mine, other) if isinstance(other, torch.Tensor) else mine == other, field.name
    assert torch.equal(teacher_blocks(pack), stock.blocks)
    assert torch.equal(pack.labels, full.labels)


def test_a_row_without_images_and_a_rank_without_work_have_the_dummy_on_both_sides(screens, model_folder, geometry):
    prepare = PrepareSettings(str(model_folder), PruneSettings(), SMALL, with_full=True)
    opened = build_index([SourceSettings(str(screens / "train.jsonl"))], prepare, num_workers=0, show_progress=False)
    dataset = PackDataset(opened.sources, prepare, geometry, dummy_image=True)
    for task in (PackTask(((0, 2, -1, 0, 0.0),)), PackTask(())):
        pack = dataset[task].pack
        assert pack.record_ids == pack.full.record_ids
        assert pack.record_ids[-1] == "dummy"
        assert teacher_blocks(pack).shape == (1, 32, 32, 3)
        assert not teacher_blocks(pack).any()


def test_moving_a_pack_moves_the_teachers_side(screens, preparer, geometry):
    preparer = dataclasses.replace(preparer, with_full=True)
    pack = distillation_pack(preparer, geometry, [chat_row("screen_0.png")], screens, decode=True)
    pack = dataclasses.replace(pack, teacher_hidden=torch.zeros(3, 2))
    moved = pack.to("meta")
    assert all(tensor.is_meta for tensor in moved.tensors())
    assert moved.full.input_ids.is_meta
    assert moved.teacher_hidden.is_meta
    num_tensors = len(list(pack.full.tensors())) + sum(
        isinstance(getattr(pack, field.name), torch.Tensor) for field in dataclasses.fields(pack)
    )
    assert len(list(pack.tensors())) == num_tensors


def test_other_supervised_tokens_stop_the_run_naming_the_record(screens, preparer, geometry):

    preparer = dataclasses.replace(preparer, with_full=True)
    one = preparer.prepare(chat_row("screen_0.png", answer="(3, 4)"), screens, record_id="train:7")
    other = preparer.prepare(chat_row("screen_0.png", answer="(3, 5)"), screens, record_id="train:7")
    with pytest.raises(AlignmentError, match="record 'train:7'"):
        with_full_rows(
            pack_samples([one.sample], geometry), [one.sample], [other.full], geometry, decode=True
        )  # fmt: skip


# --- cached targets ---


def entry(content_hash: int, labels: list[int], start: float) -> TargetEntry:
    values = torch.arange(2 * len(labels), dtype=torch.float32).view(-1, 2) + start
    return TargetEntry(content_hash, np.array(labels), {"hidden": values})


@pytest.fixture
def cache(tmp_path) -> Path:
    """Three records in two shards, hashes not in order."""
    folder = tmp_path / "cache"
    folder.mkdir()
    write_shard(folder, [entry(50, [1, 2, 3], 0), entry(7, [9], 100)])
    write_shard(folder, [entry(20, [4, 4], 200)])
    return folder


def test_targets_come_back_for_the_record_they_were_made_for(cache):
    reader = pickle.loads(pickle.dumps(TargetReader(cache)))  # a loader process gets it this way
    assert len(reader) == 3
    assert reader.has(np.array([7, 8, 20, 50])).tolist() == [True, False, True, True]
    assert torch.equal(reader.read(50, np.array([1, 2, 3]), "a")["hidden"], entry(50, [1, 2, 3], 0).values["hidden"])
    assert torch.equal(reader.read(7, np.array([9]), "b")["hidden"], entry(7, [9], 100).values["hidden"])
    assert torch.equal(reader.read(20, np.array([4, 4]), "c")["hidden"], entry(20, [4, 4], 200).values["hidden"])
    assert reader.empty()["hidden"].shape == (0, 2)


@pytest.mark.parametrize(
    ("content_hash", "labels", "message"),
    [
        (8, [1], "record 'train:3' has no teacher targets in .*cache_teacher RECIPE"),
        (10**18, [1], "record 'train:3' has no teacher targets"),
        (50, [1, 2, 4], "record 'train:3': the teacher targets in .* belong to other supervised tokens"),
        (50, [1, 2], "belong to other supervised tokens .3 of them, the record has 2"),
    ],
)
def test_a_missing_or_foreign_entry_is_an_error_that_says_how_to_build_it(cache, content_hash, labels, message):
    with pytest.raises(UserError, match=message):
        TargetReader(cache).read(content_hash, np.array(labels), "train:3")


def test_a_damaged_shard_is_named(cache):
    shard = next(cache.glob("shard-*"))
    shard.write_bytes(shard.read_bytes()[:20])
    with pytest.raises(UserError, match=f"{shard.name}: not a readable shard"):
        len(TargetReader(cache))


def test_shards_hold_nothing_but_tensors(cache):
    for path in cache.iterdir():
        with safe_open(path, framework="pt") as tensors:
            assert set(tensors.keys()) == {"content_hash", "labels_hash", "starts", "hidden"}


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_loader_brings_each_records_targets_in_the_order_of_the_pack(
    num_workers, screens, model_folder, geometry, cost, tmp_path
):
    prepare = PrepareSettings(str(model_folder), PruneSettings(), SMALL)
    index = build_index([SourceSettings(str(screens / "train.jsonl"))], prepare, num_workers=0, show_progress=False)
    preparer = prepare.build()
    folder = tmp_path / "cache"
    folder.mkdir()
    expected = {}
    for row in range(len(index)):
        sample = preparer.prepare(index.sources[0].rows[row], screens).sample
        labels = supervised_ids(sample)
        # A value that says which record and token it belongs to.
        values = torch.stack([torch.full((len(labels),), float(row)), torch.from_numpy(labels).float()], dim=1)
        expected[index.record_id(row)] = values
        write_shard(folder, [TargetEntry(int(index.content_hash[row]), labels, {"hidden": values})])
    loader = PackLoader(
        index,
        index.plan_input(cost),
        PlanSettings(samples_per_step=5, pack_tokens=120, pack_patches=400, seed=1),
        prepare,
        geometry,
        LoaderSettings(num_workers=num_workers),
        targets=TargetReader(folder),
    )
    seen = set()
    for batch in loader:
        rows = [expected[record] for record in batch.record_ids if record != "dummy"]
        assert torch.equal(batch.pack.teacher_hidden, torch.cat([torch.empty(0, 2), *rows]))
        assert torch.equal(batch.pack.teacher_hidden[:, 1].long(), batch.pack.labels)
        seen.update(batch.record_ids)
    assert seen - {"dummy"} == set(expected)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_failure_on_one_rank_is_named_there_and_ends_all(
    num_workers, screens, model_folder, geometry, cost, tmp_path
):
    """Ranks as threads: none may be left waiting for the other, and no worker's traceback takes the message's place."""
    prepare = PrepareSettings(str(model_folder), PruneSettings(), SMALL)
    index = build_index([SourceSettings(str(screens / "train.jsonl"))], prepare, num_workers=0, show_progress=False)
    settings = PlanSettings(samples_per_step=5, pack_tokens=120, pack_patches=400, seed=1)
    inputs, preparer, folder = index.plan_input(cost), prepare.build(), tmp_path / "cache"
    folder.mkdir()
    plan = plan_epoch(inputs, settings, epoch=0, world_size=2)
    missing = int(plan[1].micro_steps[0][1][0])  # in the second step, on rank 1
    for row in set(range(len(index))) - {missing}:
        labels = supervised_ids(preparer.prepare(index.sources[0].rows[row], screens).sample)
        write_shard(
            folder, [TargetEntry(int(index.content_hash[row]), labels, {"hidden": torch.zeros(len(labels), 2)})]
        )
    sums, errors = Sums(2), {}

    def one_rank(rank):
        options = {"rank": rank, "world_size": 2, "sum_over_ranks": sums.of(rank), "targets": TargetReader(folder)}
        loader = PackLoader(
            index, inputs, settings, prepare, geometry, LoaderSettings(num_workers=num_workers), **options
        )
        try:
            list(loader)
        except UserError as error:
            errors[rank] = error

    threads = [threading.Thread(target=one_rank, args=(rank,)) for rank in range(2)]
    [thread.start() for thread in threads]
    [thread.join(280) for thread in threads]
    assert isinstance(errors[1], RankError)
    assert str(errors[1]).startswith(f"record {index.record_id(missing)!r} has no teacher targets")
    assert not isinstance(errors[0], RankError)
    assert "1 other ranks" in str(errors[0])


def test_a_rank_without_work_has_no_targets(screens, model_folder, geometry, cache):
    prepare = PrepareSettings(str(model_folder), PruneSettings(), SMALL)
    index = build_index([SourceSettings(str(screens / "train.jsonl"))], prepare, num_workers=0, show_progress=False)
    dataset = PackDataset(index.sources, prepare, geometry, dummy_image=True, targets=TargetReader(cache))
    assert dataset[PackTask(())].pack.teacher_hidden.shape == (0, 2)


def test_the_sample_screenshots_are_there():
    assert len(SAMPLE_IMAGES) == 60
