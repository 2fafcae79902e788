"""Distillation through the real trainer: online and cached, on one and two ranks, stopped and resumed."""

from __future__ import annotations

import pytest

from tests.ranks import run_ranks
from tests.samples import chat_row, draw_screen, draw_walk, walk_row, write_jsonl

pytestmark = pytest.mark.ranks
NUM_RECORDS, NUM_SESSIONS = 14, 9


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Screens of two sizes with answers of uneven length; every fifth record is text only."""
    folder = tmp_path_factory.mktemp("data")
    rows = []
    for i in range(NUM_RECORDS):
        name = f"screen_{i}.png" if i % 5 != 4 else None
        if name:
            draw_screen(i, *((192, 128) if i % 2 else (256, 160))).save(folder / name)
        rows.append(chat_row(name, f"Find {i}", f"({i}, {3 * i}) {'yes ' * (i % 4)}"))
    for seed in range(NUM_SESSIONS):
        for step, picture in enumerate(draw_walk(3, seed)):
            picture.save(folder / f"walk{seed}-{step}.png")
    names = [[f"walk{seed}-{step}.png" for step in range(1 + seed % 3)] for seed in range(NUM_SESSIONS)]
    walks = [walk_row(images, answer=f"At ({seed}, 4)") for seed, images in enumerate(names)]
    write_jsonl(folder / "walks.jsonl", walks)
    return write_jsonl(folder / "train.jsonl", rows)


@pytest.fixture(scope="module")
def results(toy_folder, data, tmp_path_factory) -> dict[int, dict]:
    """What one rank and two ranks measured."""
    folder = tmp_path_factory.mktemp("kd")
    program = "tests.training.kd_program"
    return {n: run_ranks(program, n, folder / f"{n}.json", str(toy_folder), str(data)) for n in (1, 2)}


def assert_near(run: dict, reference: dict) -> None:
    """float32 sums in another order, through four optimizer steps."""
    assert len(run["steps"]) == len(reference["steps"]) == 4
    for step, other in zip(run["steps"], reference["steps"], strict=True):
        assert step["num_supervised"] == other["num_supervised"]
        for name in ("loss", "ce", "kl", "teacher_entropy"):
            assert step[name] == pytest.approx(other[name], rel=1e-5, abs=1e-5), name


def test_sessions_train_alike_cut_in_the_middle_on_two_ranks_and_from_a_cache(results):
    for num_ranks in (1, 2):
        found = results[num_ranks]["sessions"]
        assert found["resumed"] == found["online"], "the same bits"
        assert found["pruned"]["direction"] == "backward", "an export says what auto came to"
        # The cache is computed in packs of its own, whose products round in other last bits.
        assert_near(found["cached"], found["online"])
    assert_near(results[2]["sessions"]["online"], results[1]["sessions"]["online"])


def test_kd_weight_0_is_cross_entropy_bit_for_bit(results):
    assert results[1]["kd_weight 0"] == results[1]["ce"]
    assert {step["kl"] for step in results[1]["ce"]["steps"]} == {0.0}


def test_without_pruning_the_first_step_has_nothing_to_learn_from_the_teacher(results):
    first = results[1]["no pruning"]["steps"][0]
    assert abs(first["kl"]) <= 1e-6
    assert first["teacher_agreement"] == 1.0


def test_distillation_is_reported_apart(results):
    for step in results[1]["online, packed"]["steps"]:
        assert step["loss"] == pytest.approx(step["ce"] + step["kl"], rel=1e-5)
        assert step["kl"] > 0
        assert step["teacher_entropy"] > 0
        assert 0 <= step["teacher_agreement"] <= 1
    assert results[1]["online, packed"]["steps"][-1]["loss"] != results[1]["ce"]["steps"][-1]["loss"]


def test_a_float32_cache_trains_as_the_online_teacher_does_bit_for_bit(results):
    """Identical packs: one record each, when cached and when trained on."""
    assert results[1]["cached, singly"] == results[1]["online, singly"]


def test_a_cache_made_from_other_packs_is_equal_to_rounding(results):
    assert_near(results[1]["cached, packed"], results[1]["online, packed"])


def test_the_way_packs_are_cut_changes_nothing_but_rounding(results):
    assert_near(results[1]["online, small packs"], results[1]["online, packed"])


@pytest.mark.parametrize("source", ["online", "cached"])
def test_a_resumed_run_learns_from_the_same_teacher(source, results):
    """Were the teacher the checkpoint's weights, the losses after step 2 would be others."""
    assert results[1][f"resumed {source}"] == results[1][f"{source}, singly"]


def test_the_teachers_weights_do_not_change(results):
    hashes = results[1]["teacher weights"]
    assert len(hashes) == 3
    assert len(set(hashes)) == 1, "after training, and in the run that has not trained yet"
    assert results[1]["online, singly"]["weights"] != results[1]["ce"]["weights"]


@pytest.mark.parametrize(
    ("what", "parts"),
    [
        ("vit frozen", ["llm", "merger"]),
        ("llm frozen", ["merger", "vit"]),
        ("adapters on the llm", ["llm"]),
        ("adapters on the llm, cached", ["llm"]),
    ],
)
def test_a_student_that_is_trained_in_part_learns_there_only(what, parts, results):
    assert results[1]["changed"][what] == parts


def test_a_missing_cache_says_how_to_build_it(results):
    message = results[1]["without a cache"]
    assert f"{NUM_RECORDS} of {NUM_RECORDS} records have no teacher targets" in message
    assert "python -m training.cache_teacher RECIPE" in message


def test_a_cache_that_lost_a_shard_is_repaired_by_computing_what_is_missing(results):
    repair = results[1]["repair"]
    assert repair["num_shards"] == 3, "14 records, 5 in a shard"
    assert repair["num_untouched"] == 2
    assert repair["num_left"] < NUM_RECORDS == repair["num_after"]
    assert f"{NUM_RECORDS - repair['num_left']} of {NUM_RECORDS} records have no teacher targets" in repair["message"]
    assert repair["partials"] == [], "what a killed run left half written is gone"


@pytest.mark.parametrize("teacher", ["online, packed", "cached, packed"])
def test_two_ranks_distil_as_one_does(teacher, results):
    assert_near(results[2][teacher], results[1]["online, packed"])


def test_two_ranks_share_the_work_of_a_cache(results):
    assert results[2]["num_cached"] == NUM_RECORDS
    assert results[2]["same folder on both ranks"]


def test_a_teacher_spread_over_ranks_says_what_a_replica_says(results):
    """ZeRO-3 inference over gloo; with the vision part frozen, where packs would go without the dummy image."""
    assert_near(results[2]["sharded"], results[2]["replica, vision frozen"])
    assert results[2]["num_cached_sharded"] == NUM_RECORDS


def test_a_spread_teacher_is_divided_before_deepspeed_moves_it(results):
    """`deepspeed.initialize` moves what it gets to the device: a rank has half of every tensor by then, and padding."""
    models = results[2]["handed over"]
    assert len(models) == 2, "of the training run, and of the run that fills a cache"
    for model in models:
        assert model["whole"] == 0
        assert model["all"] / 2 <= model["shares"] <= 1.001 * model["all"] / 2
    assert results[2]["linear is torch's"], "ZeRO-3 of the teacher changed the linear layers of the student"
