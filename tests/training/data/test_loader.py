"""Packs against samples prepared one by one; the resume drill; records that go bad while a run is under way."""

import dataclasses
import json
import multiprocessing
import threading
from collections import Counter

import pytest
import torch

from pixelprune.flops import CostModel
from pixelprune.pack import VisionGeometry, pack_samples
from pixelprune.records.collator import DUMMY_ID
from pixelprune.records.prepare import PrepareSettings
from pixelprune.settings import PruneSettings, ResizeSettings
from tests.samples import write_jsonl
from training.data.index_builder import build_index
from training.data.loader import Cursor, LoaderSettings, PackLoader
from training.data.plan import PlanSettings, plan_epoch
from training.data.quarantine import read_quarantine
from training.data.settings import SourceSettings

PLAN = PlanSettings(samples_per_step=5, pack_tokens=120, pack_patches=400, seed=1)


class Setup:
    """A small data set, indexed, and loaders over it."""

    def __init__(self, folder, model_folder, **source):
        from transformers import AutoConfig

        self.prepare = PrepareSettings(str(model_folder), PruneSettings(), ResizeSettings(min_pixels=32 * 32))
        config = AutoConfig.from_pretrained(model_folder)
        self.geometry = VisionGeometry.from_config(config)
        sources = [SourceSettings(str(folder / "train.jsonl"), **source)]
        self.index = build_index(sources, self.prepare, num_workers=0, show_progress=False)
        self.inputs = self.index.plan_input(CostModel.from_config(config))

    def loader(self, plan=PLAN, settings=None, **options) -> PackLoader:
        return PackLoader(
            self.index, self.inputs, plan, self.prepare, self.geometry, settings or LoaderSettings(), **options
        )


@pytest.fixture
def setup(screens, model_folder) -> Setup:
    return Setup(screens, model_folder)


def same_pack(one, other):
    for field in dataclasses.fields(one):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype
            assert torch.equal(a, b), field.name
        else:
            assert a == b, field.name


def real_ids(batches):
    return [record for batch in batches for record in batch.record_ids if record != DUMMY_ID]


def test_packs_are_the_planned_samples(setup):
    preparer = setup.prepare.build()
    source = setup.index.sources[0]
    for rank in range(2):
        batches = iter(setup.loader(rank=rank, world_size=2))
        plan = plan_epoch(setup.inputs, PLAN, epoch=0, world_size=2)
        for step, planned in enumerate(plan):
            for micro_step, packs in enumerate(planned.micro_steps):
                batch = next(batches)
                assert (batch.step, batch.micro_step) == (step, micro_step)
                assert batch.is_boundary == (micro_step == planned.num_micro_steps - 1)
                assert (batch.num_supervised, batch.num_samples) == (planned.num_supervised, planned.num_samples)
                rows = setup.index.row[packs[rank]].tolist()
                samples = [
                    preparer.prepare(source.rows[row], source.root, record_id=f"train:{row}").sample for row in rows
                ]
                if any(sample.images for sample in samples):
                    same_pack(batch.pack, pack_samples(samples, setup.geometry))
                else:
                    assert batch.record_ids == (*(f"train:{row}" for row in rows), DUMMY_ID)
                assert batch.is_dummy == (not rows)
        assert next(batches, None) is None


def test_supervised_tokens_of_a_step_are_those_of_its_packs(setup):
    counts = Counter()
    planned = {}
    for rank in range(3):
        for batch in setup.loader(rank=rank, world_size=3):
            counts[batch.step] += batch.pack.num_supervised
            planned[batch.step] = batch.num_supervised
    assert counts == planned


@pytest.mark.parametrize("resumed_size", [1, 2, 4])
@pytest.mark.parametrize("every", [1, 2, 3])
def test_resume_drill(setup, resumed_size, every):
    """Two ranks stop after every k-th batch; another number of ranks goes on with exactly what was not seen.

    A step counts once its boundary was consumed: an unfinished step did not update the weights and is run again.
    """
    full = [list(setup.loader(rank=rank, world_size=2)) for rank in range(2)]
    num_batches = len(full[0])
    assert num_batches == len(full[1])
    assert Counter(real_ids(full[0] + full[1])) == Counter(f"train:{i}" for i in range(24))
    for stop in range(every, num_batches + 1, every):
        cursor = full[0][stop - 1].cursor
        assert cursor == full[1][stop - 1].cursor
        done = cursor.step if cursor.epoch == 0 else full[0][-1].step + 1
        seen = [batch for batches in full for batch in batches[:stop] if batch.step < done]
        rest = []
        for rank in range(resumed_size):
            loader = setup.loader(rank=rank, world_size=resumed_size, cursor=cursor, num_steps=full[0][-1].step + 1)
            rest += list(loader)
        assert Counter(real_ids(seen) + real_ids(rest)) == Counter(f"train:{i}" for i in range(24))
        assert min((batch.step for batch in rest), default=done) == done


def test_resumed_packs_are_bit_equal(setup):
    whole = list(setup.loader(num_steps=8))
    assert {batch.cursor.epoch for batch in whole} == {0, 1}, "the run crosses an epoch"
    for stop in (1, 2, len(whole) // 2):
        cursor = whole[stop].cursor
        rest = list(setup.loader(cursor=cursor, num_steps=8))
        expected = [batch for batch in whole if batch.step >= rest[0].step]
        assert len(rest) == len(expected)
        for a, b in zip(rest, expected, strict=True):
            same_pack(a.pack, b.pack)
            assert (a.step, a.cursor, a.num_supervised) == (b.step, b.cursor, b.num_supervised)


def test_epochs_differ_and_steps_go_on_counting(setup):
    batches = list(setup.loader(num_steps=10))
    epochs = [[b for b in batches if b.step < 5], [b for b in batches if b.step >= 5]]
    assert real_ids(epochs[0]) != real_ids(epochs[1])
    assert Counter(real_ids(epochs[0])) == Counter(real_ids(epochs[1]))
    assert batches[-1].cursor == Cursor(2, 0)


def test_workers_give_the_same_batches_again_and_again(setup):
    alone = list(setup.loader())
    loader = setup.loader(settings=LoaderSettings(num_workers=2))
    for _ in range(2):
        pooled = list(loader)
        assert len(pooled) == len(alone)
        for a, b in zip(pooled, alone, strict=True):
            same_pack(a.pack, b.pack)


def test_iterating_again_takes_the_same_worker_processes(setup):
    loader = setup.loader(settings=LoaderSettings(num_workers=2))
    before = {process.pid for process in multiprocessing.active_children()}
    list(loader)
    workers = {process.pid for process in multiprocessing.active_children()}
    list(loader)
    assert {process.pid for process in multiprocessing.active_children()} == workers
    assert len(workers - before) == 2
    del loader
    assert not {process.pid for process in multiprocessing.active_children()} & (workers - before)


def test_each_iteration_counts_the_lost_anew(setup, screens):
    (screens / "screen_4.png").unlink()  # one of 24 records, allowed once
    loader = setup.loader(settings=LoaderSettings(max_quarantined_share=0.06))
    assert [len(real_ids(loader)) for _ in range(3)] == [23, 23, 23]


def test_steps_are_counted_from_the_first_step_given(setup):
    batches = list(setup.loader(cursor=Cursor(1, 0), first_step=7, num_steps=9))
    assert {batch.step for batch in batches} == {7, 8}
    assert {batch.cursor for batch in batches if batch.is_boundary} == {Cursor(1, 1), Cursor(1, 2)}


def test_more_ranks_than_samples_leaves_dummies(setup):
    plan = dataclasses.replace(PLAN, samples_per_step=3)
    num_dummies = 0
    for rank in range(8):
        for batch in setup.loader(plan, rank=rank, world_size=8):
            num_dummies += batch.is_dummy
            assert batch.pack.num_patches > 0, "every rank runs the vision tower in every micro-step"
            assert batch.is_dummy == (batch.record_ids == (DUMMY_ID,))
    assert num_dummies == 8 * 5


def test_frozen_vision_needs_no_dummy_images(setup):
    settings = LoaderSettings(dummy_image=False)
    ranks = [setup.loader(settings=settings, rank=rank, world_size=6) for rank in range(6)]
    text_only = [batch for loader in ranks for batch in loader if not batch.is_dummy and batch.pack.num_patches == 0]
    assert text_only
    assert all(DUMMY_ID not in batch.record_ids for batch in text_only)


class Sums:
    """Sums tensors over ranks that run as threads."""

    def __init__(self, world_size):
        self.barrier, self.values = threading.Barrier(world_size), {}

    def of(self, rank):
        def sum_over_ranks(values):
            self.values[rank] = values
            self.barrier.wait()
            total = torch.stack(list(self.values.values())).sum(0)
            self.barrier.wait()
            return total

        return sum_over_ranks


def run_ranks(setup, world_size, settings):
    sums, found = Sums(world_size), {}

    def one_rank(rank):
        options = {"rank": rank, "world_size": world_size, "sum_over_ranks": sums.of(rank)}
        report = settings.report.with_name(f"rank{rank}.jsonl")
        found[rank] = list(setup.loader(settings=dataclasses.replace(settings, report=report), **options))

    threads = [threading.Thread(target=one_rank, args=(rank,)) for rank in range(world_size)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    return found


def test_records_that_went_bad_leave_the_count_on_all_ranks(setup, screens, tmp_path, caplog):
    (screens / "screen_0.png").write_bytes((screens / "screen_1.png").read_bytes())
    (screens / "screen_4.png").unlink()
    (screens / "screen_6.png").write_bytes((screens / "screen_6.png").read_bytes()[:200])
    settings = LoaderSettings(max_quarantined_share=0.2, report=tmp_path / "report.jsonl")
    found = run_ranks(setup, 2, settings)
    lost = {"train:0", "train:4", "train:6"}
    assert set(real_ids(found[0] + found[1])) == {f"train:{i}" for i in range(24)} - lost
    per_step = Counter()
    for batch in found[0] + found[1]:
        per_step[batch.step] += batch.pack.num_supervised
    for batches in found.values():
        assert {batch.step: batch.num_supervised for batch in batches} == per_step
    assert sum({batch.step: batch.num_samples for batch in found[0]}.values()) == 21
    entries = [entry for rank in range(2) for entry in read_quarantine(tmp_path / f"rank{rank}.jsonl")]
    reasons = {entry.record: entry.reason for entry in entries}
    assert reasons == {"train:0": "changed", "train:4": "missing_file", "train:6": "changed"}
    assert "quarantined train:4" in caplog.text


def test_the_divisor_of_a_step_is_the_sum_of_the_weights_in_its_packs(screens, model_folder, tmp_path):
    """On all ranks, and without the weights of what went bad: known to the plan, measured from the packs."""
    rows = [json.loads(line) for line in (screens / "train.jsonl").read_text().splitlines()]
    for i, row in enumerate(rows):
        row["messages"][-1]["loss_weight"] = (0.5, 1, 0.3)[i % 3]
    write_jsonl(screens / "train.jsonl", rows)
    setup = Setup(screens, model_folder)
    (screens / "screen_4.png").unlink()
    found = run_ranks(setup, 2, LoaderSettings(max_quarantined_share=0.2, report=tmp_path / "report.jsonl"))
    per_step, parts = Counter(), {"train:4"}
    for batch in found[0] + found[1]:
        pack = batch.pack
        parts |= set(real_ids([batch]))
        expected = []
        for record, num in zip(pack.record_ids, pack.num_supervised_per_sample, strict=True):
            if num:
                expected += [(0.5, 1, 0.3)[int(record.split(":")[1]) % 3]] * num
        assert pack.weights.dtype == torch.float32
        assert pack.weights.tolist() == torch.tensor(expected, dtype=torch.float32).tolist()
        assert pack.is_weighted == any(weight != 1 for weight in expected)
        assert pack.loss_weight == pytest.approx(sum(pack.weights.double().tolist()), rel=1e-12)
        per_step[batch.step] += pack.loss_weight
    assert len(parts) == 24
    for batches in found.values():
        assert {batch.step: batch.loss_weight for batch in batches} == pytest.approx(per_step, rel=1e-12)


def test_a_sources_loss_weight_multiplies_those_of_its_tokens(screens, model_folder):
    """In packs as in the plan's divisor; what is indexed does not depend on it."""
    rows = [json.loads(line) for line in (screens / "train.jsonl").read_text().splitlines()]
    rows[0]["messages"][-1]["weight"] = 0.5
    write_jsonl(screens / "train.jsonl", rows)
    plain, weighted = Setup(screens, model_folder), Setup(screens, model_folder, loss_weight=0.25)
    assert plain.index.files == weighted.index.files
    assert weighted.index.loss_weight.tolist() == (plain.index.loss_weight / 4).tolist()
    for one, other in zip(plain.loader(), weighted.loader(), strict=True):
        assert other.pack.weights.tolist() == (one.pack.weights / 4).tolist()
        assert other.pack.labels.tolist() == one.pack.labels.tolist()
        assert other.loss_weight == one.loss_weight / 4
        assert other.pack.is_weighted or not other.num_supervised
    with pytest.raises(ValueError, match="loss_weight: expected a number > 0"):
        SourceSettings("a.jsonl", loss_weight=0.0)


def test_too_much_gone_bad_ends_the_run(setup, screens):
    for i in range(6):
        (screens / f"screen_{i}.png").unlink(missing_ok=True)
    with pytest.raises(ValueError, match=r"can no longer be used.*data\.max_quarantined_share"):
        list(setup.loader(settings=LoaderSettings(max_quarantined_share=0.1)))


def test_a_pack_that_lost_everything_is_a_dummy(setup, screens):
    for path in screens.glob("*.png"):
        path.unlink()
    batches = list(setup.loader(settings=LoaderSettings(max_quarantined_share=1.0)))
    assert sum(batch.is_dummy for batch in batches) > 0
    assert Counter(real_ids(batches)) == Counter(f"train:{i}" for i in range(2, 24, 3))


def test_a_step_left_early_does_not_shift_the_next(setup):
    plain = {step: real_ids(batches) for step, batches in setup.loader().steps()}
    hasty = {}
    for step, batches in setup.loader().steps():
        hasty[step] = real_ids([next(batches)])
    assert all(plain[step][: len(ids)] == ids for step, ids in hasty.items())
    assert len(hasty) == len(plain)
