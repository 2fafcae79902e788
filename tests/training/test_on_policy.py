"""The student's own answers in training: drawn again after a resume, graded alike on any ranks, no labels."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from pixelprune.images.image import prune_pixels
from pixelprune.pack import pack_samples
from pixelprune.sample import build_sample
from pixelprune.settings import PruneSettings
from tests.pixelprune.reference import chat_of
from tests.ranks import run_ranks
from tests.samples import chat_row, draw_screen, write_jsonl
from tests.training.test_teacher import RECORDS, pictures
from training.config.recipe import load_recipe
from training.config.settings import ConfigError
from training.loss.supervised import LossSettings, supervised_loss
from training.on_policy.draft import Draft, is_chosen, prompt_of, with_answer


@pytest.fixture(scope="module")
def results(toy_folder, tmp_path_factory) -> dict[int, dict]:
    folder = tmp_path_factory.mktemp("on_policy")
    rows = []
    for i in range(8):
        name = f"screen_{i}.png" if i % 4 != 3 else None
        if name:
            draw_screen(i, 96, 64 + 32 * (i % 2)).save(folder / name)
        rows.append(chat_row(name, f"Find {i}", f"({i}, {3 * i}) {'yes ' * (i % 3)}"))
    rows[2]["messages"].pop()
    data = write_jsonl(folder / "train.jsonl", rows)
    program = "tests.training.on_policy_program"
    return {n: run_ranks(program, n, folder / f"{n}.json", str(toy_folder), str(data)) for n in (1, 2)}


@pytest.mark.ranks
def test_a_teacher_that_is_the_student_has_nothing_to_say_of_its_answers(results):
    (row,) = results[1]["same"]["rows"]
    assert abs(row["kl"]) <= 1e-6
    assert row["teacher_agreement"] == 1.0
    assert (row["on_policy_share"], row["ce"], row["token_accuracy"]) == (1.0, 0.0, 0.0)
    assert 0 < row["generate_share"] < 1


@pytest.mark.ranks
def test_a_resumed_run_draws_the_same_answers(results):
    whole = [pack for pack in results[1]["half"]["packs"][0] if pack["step"] >= 2]
    assert results[1]["resumed"]["packs"][0] == whole
    losses = [[(row["loss"], row["kl"], row["ce"]) for row in results[1][name]["rows"]] for name in ("half", "resumed")]
    assert losses[0] == losses[1]
    assert results[1]["weights"][0] == results[1]["weights"][1]


@pytest.mark.ranks
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_every_step_divides_by_what_all_ranks_hold(num_ranks, results):
    """Answers differ in length from the records' and between ranks; which samples are asked does not."""
    by_rank = results[num_ranks]["half"]["packs"]
    assert len(by_rank) == num_ranks
    steps = sorted({pack["step"] for pack in by_rank[0]})
    assert len(steps) == 4
    for step in steps:
        packs = [pack for packs in by_rank for pack in packs if pack["step"] == step]
        assert {pack["num_supervised"] for pack in packs} == {sum(len(pack["labels"]) for pack in packs)}
        assert {pack["loss_weight"] for pack in packs} == {sum(len(pack["labels"]) for pack in packs)}
        assert all(pack["labels"] == pack["full_labels"] for pack in packs)
    if num_ranks == 2:
        lengths = [
            [sum(p["labelled"].count(False) for p in packs if p["step"] == s) for s in steps] for packs in by_rank
        ]
        assert lengths[0] != lengths[1], "uneven"


@pytest.mark.ranks
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_record_without_an_answer_is_always_answered_by_the_student(num_ranks, results):
    packs = [pack for packs in results[num_ranks]["half"]["packs"] for pack in packs]
    of_record = [sample for pack in packs for sample in pack["samples"] if sample[0] == "train:2"]
    assert len(of_record) == 2, "an epoch each"
    assert not any(True in labelled for _, labelled in of_record)


@pytest.mark.ranks
def test_two_ranks_ask_the_samples_that_one_asks(results):
    shares = [[row.get("on_policy_share") for row in results[n]["half"]["rows"]] for n in (1, 2)]
    assert shares[0] == shares[1]
    assert any(share is not None and 0 < share < 1 for share in shares[0])


@pytest.mark.ranks
def test_a_checkpoint_holds_the_student_alone(results):
    """Weights and two moments of Adam in float32; a teacher in it would make it larger by a third."""
    sizes = results[1]["bytes"]
    assert 12 * sizes["model"] <= sizes["checkpoint"] <= 12.2 * sizes["model"]


@pytest.fixture(scope="module")
def samples(toy_tokenizer, geometry):
    """(pruned, full) samples of three records with one, two and no images."""
    made = []
    for number, (question, answer, num_images) in enumerate(RECORDS):
        chat = chat_of(toy_tokenizer, question, answer, num_images)
        pair = []
        for name in ("pred2d", "none"):
            images = [prune_pixels(p, PruneSettings(name), p.shape[:2]) for p in pictures(number, num_images)]
            pair.append(build_sample(chat, images, image_token_id=geometry.image_token_id, record_id=f"r{number}"))
        made.append(tuple(pair))
    return made


def test_a_prompt_with_the_records_own_answer_is_the_record(samples, geometry):
    for pair in samples:
        for sample in pair:
            start = int(np.flatnonzero(sample.supervised)[0])
            prompt = prompt_of(sample, geometry.image_token_id)
            assert prompt.input_ids.tolist() == sample.input_ids[:start].tolist()
            again = with_answer(sample, sample.input_ids[sample.supervised].tolist())
            length = len(again)
            assert again.input_ids.tolist() == sample.input_ids[:length].tolist()
            assert again.position_ids.tolist() == sample.position_ids[:, :length].tolist()
            assert again.supervised.tolist() == sample.supervised[:length].tolist()
            assert prompt.next_position == sample.position_ids[0, start]


def test_an_image_behind_the_answer_is_not_led_to_by_another(samples, geometry):
    sample, _ = samples[0]
    behind = dataclasses.replace(sample, supervised=np.arange(len(sample)) == 1)
    assert prompt_of(behind, geometry.image_token_id) is None


def test_a_draft_becomes_the_pack_of_its_answers(samples, geometry):
    pruned, full = [pair[0].weighted(0.5) for pair in samples], [pair[1] for pair in samples]
    draft = Draft(pruned, full, (True, False, True), geometry, decode=True, share_prefix=False)
    assert list(draft.prompts()) == [0, 2]
    pack = draft.packed({0: [7, 8, 9], 2: [5]})
    own = pruned[1].input_ids[pruned[1].supervised].tolist()
    assert pack.labels.tolist() == pack.full.labels.tolist() == [7, 8, 9, *own, 5]
    assert pack.labelled.tolist() == [False] * 3 + [True] * len(own) + [False]
    assert (pack.num_own, pack.num_own_tokens, pack.own_weight) == (2, 4, 2.0)
    assert pack.loss_weight == 0.5 * len(pack.labels)
    assert draft.packed({}).labels.tolist() == pack_samples(pruned, geometry).labels.tolist()


def test_what_the_student_wrote_is_no_label():
    """Against the two terms written out: cross-entropy of the labels alone, divergence of all tokens."""
    torch.manual_seed(0)
    hidden, teacher = torch.randn(6, 8, dtype=torch.float64), torch.randn(6, 8, dtype=torch.float64)
    head = torch.nn.Linear(8, 11, bias=False).double()
    labels, labelled = torch.arange(6), torch.tensor([True, False, True, True, False, True])
    weights = torch.rand(6, dtype=torch.float32)
    settings = LossSettings(ce_weight=0.7, kd_weight=1.3, temperature=2.0)
    student = hidden.clone().requires_grad_()
    sums = supervised_loss(
        student, head, labels, settings, weights=weights, labelled=labelled, teacher_hidden=teacher, teacher_head=head
    )
    other = hidden.clone().requires_grad_()
    log_q = head(other).log_softmax(-1)
    ce = -(log_q[torch.arange(6), labels] * weights)[labelled].sum()
    p, q = (head(teacher) / 2).softmax(-1), (head(other) / 2).softmax(-1)
    kl = ((p * (p.log() - q.log())).sum(-1) * weights).sum()
    total = 0.7 * ce + 1.3 * 4 * kl
    torch.testing.assert_close(sums.total, total.detach(), check_dtype=False)
    torch.testing.assert_close(sums.ce, ce.detach(), check_dtype=False)
    mine, expected = (torch.autograd.grad(value, row)[0] for value, row in ((sums.total, student), (total, other)))
    torch.testing.assert_close(mine, expected)
    assert int(sums.num_correct) == int(((head(hidden).argmax(-1) == labels) & labelled).sum())


def test_a_share_of_the_samples_is_chosen_whoever_asks():
    chosen = [is_chosen(0.3, 0, 0, step, row) for step in range(20) for row in range(200)]
    assert abs(np.mean(chosen) - 0.3) < 0.03
    assert not any(is_chosen(0.0, row) for row in range(100))
    assert all(is_chosen(1.0, row) for row in range(100))


@pytest.mark.parametrize("override", ["kd.source=cached", "loss.kd_weight=0"])
def test_nobody_to_grade_them_is_refused(override):
    with pytest.raises(ConfigError, match="graded by a teacher"):
        load_recipe("configs/kd_recovery_debug.yaml", ["kd.on_policy=0.5", override])
