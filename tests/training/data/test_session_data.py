"""Records of sessions from the index to a packed row with its teacher's side."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import numpy as np
import pytest
import torch

from pixelprune.attention.prefixes import find_groups
from pixelprune.sessions import select_session
from pixelprune.settings import PruneSettings
from tests.samples import draw_walk, walk_row, write_jsonl
from tests.training.data.test_sharing import Setup, task_of
from training.data.index_builder import build_index
from training.data.settings import SourceSettings

NAMES = ("a", "b")
NUM_STEPS = 4
# Two questions about one history; the same screenshots but the last; the same but the first; the history alone.
RECORDS = [
    (["a0", "a1", "a2"], "What changed?"),
    (["a0", "a1", "a2"], "Where is it now?"),
    (["a0", "a1", "b2"], "What changed?"),
    (["b0", "a1", "a2"], "What changed?"),
    (["a0", "a1"], "What changed?"),
]


@pytest.fixture
def folder(tmp_path):
    for seed, name in enumerate(NAMES):
        for step, picture in enumerate(draw_walk(NUM_STEPS, seed)):
            picture.save(tmp_path / f"{name}{step}.png")
    rows = [walk_row([f"{name}.png" for name in names], question) for names, question in RECORDS]
    write_jsonl(tmp_path / "train.jsonl", [*rows, walk_row(["a0.png", "a1.png"], every_turn=True)])
    return tmp_path


def images_of(record: int) -> list[np.ndarray]:
    walks = {name: draw_walk(NUM_STEPS, seed) for seed, name in enumerate(NAMES)}
    return [np.asarray(walks[name[0]][int(name[1])]) for name in RECORDS[record][0]]


def test_what_a_screenshot_costs_depends_on_its_conversation(folder, model_folder):
    for direction, num_usable in (("backward", len(RECORDS)), ("forward", len(RECORDS) + 1)):
        prune = PruneSettings("pred3d", direction=direction, keep_replaced=False)
        setup = Setup(folder, model_folder)
        prepare = dataclasses.replace(setup.prepare, prune=prune)
        index = build_index([SourceSettings(str(folder / "train.jsonl"))], prepare, num_workers=0, show_progress=False)
        assert len(index) == num_usable, "backward, the record with an earlier turn trained on is left out"
        plan_input = index.plan_input(setup.cost)
        for record in range(len(RECORDS)):
            kept = [one.num_kept for one in select_session(images_of(record), direction=direction)]
            assert index.num_kept[record] == sum(kept)
        assert len(set(index.content_hash.tolist())) == num_usable, "another history is another record"
        assert plan_input.cost[0] < setup.index.plan_input(setup.cost).cost[0], "than each screenshot by itself"


@pytest.mark.parametrize("direction", ["backward", "forward"])
def test_the_same_history_alone_is_shared_and_the_teacher_sees_its_own_pixels(direction, folder, model_folder):
    setup = Setup(folder, model_folder, with_full=True)
    setup.prepare = dataclasses.replace(setup.prepare, prune=PruneSettings("pred3d", direction=direction))
    source, rows = setup.index.sources[0], [0, 2, 3, 1, 4]
    preparer = setup.prepare.build()
    samples = [preparer.prepare(source.rows[row], source.root).sample for row in rows]
    groups = find_groups(samples, setup.geometry.image_token_id)
    shared = {tuple(sorted(rows[member] for member in group.members)) for group in groups if len(group.members) > 1}
    if direction == "backward":
        # What is kept hangs on the screenshots behind. In 2 the last one is a stranger, so a1 stands alone, as in 4.
        assert samples[1].images[1].selection.image is None
        assert shared == {(0, 1), (2, 4)}
    else:
        assert shared
        assert all(3 not in members for members in shared), "another first screenshot"
    unpruned = dataclasses.replace(setup.prepare, prune=PruneSettings("none"), with_full=False).build()
    originals = [unpruned.prepare(source.rows[row], source.root).sample.images for row in rows]
    for share in ("prefix", "vision"):
        pack = setup.dataset(share)[task_of(rows)].pack
        full = pack.full_pack()
        assert len(full.vit_cu_seqlens) <= sum(map(len, originals)), "some picture is encoded once for several records"
        assert torch.equal(pack.full.labels, pack.labels)
        decoded = full.blocks[full.block_index]
        assert len(decoded) * 4 == full.num_patches
        borders = (full.vit_cu_seqlens // 4).tolist()
        found = {decoded[start:stop].numpy().tobytes() for start, stop in pairwise(borders)}
        assert found == {image.blocks.tobytes() for images in originals for image in images}
    # Without sharing every image stands in the row for itself, in order.
    apart = setup.dataset("off")[task_of(rows)].pack.full_pack()
    expected = np.concatenate([image.blocks for images in originals for image in images])
    assert torch.equal(apart.blocks[apart.block_index], torch.from_numpy(expected))
