"""The row of the collator gives the loss of the samples run apart; it trains in a plain HF Trainer."""

import json

import numpy as np
import pytest
import torch
from transformers import Qwen3VLForConditionalGeneration, Trainer, TrainingArguments

from pixelprune.images.patch_embed import take_blocks
from pixelprune.records.chat import ChatEncoder
from pixelprune.records.collator import DUMMY_ID, DUMMY_TOKENS, PixelPruneCollator, dummy_sample
from pixelprune.records.record import RecordError
from pixelprune.settings import PruneSettings, ResizeSettings
from tests.samples import chat_row, draw_screen
from training.composition.toy import build_toy_model

SMALL = ResizeSettings(min_pixels=32 * 32)


@pytest.fixture(scope="module")
def toy_folder(tmp_path_factory):
    return str(build_toy_model(tmp_path_factory.mktemp("toy")))


@pytest.fixture
def records(screens):
    return [json.loads(line) for line in (screens / "train.jsonl").read_text().splitlines()]


def test_loss_of_the_row_is_that_of_its_samples_apart(toy_folder, screens, records):
    collator = PixelPruneCollator.from_pretrained(toy_folder, resize=SMALL, root=screens)
    model = Qwen3VLForConditionalGeneration.from_pretrained(toy_folder, dtype=torch.float32).eval()
    chosen = records[:5]
    with torch.no_grad():
        together = model(**collator(chosen)).loss
        total, num = 0.0, 0
        for record in chosen:
            row = collator([record])
            labels = row.pop("labels")[0]
            supervised = (labels != -100).nonzero()[:, 0]
            log_probs = model(**row).logits[0].log_softmax(-1)
            total -= log_probs[supervised - 1, labels[supervised]].sum()
            num += len(supervised)
    torch.testing.assert_close(together, total / num, rtol=1e-5, atol=1e-5)


def test_weights_that_labels_cannot_carry_are_refused(toy_folder, screens, records):
    collator = PixelPruneCollator.from_pretrained(toy_folder, resize=SMALL, root=screens)
    records[0]["messages"][-1]["loss_weight"] = 0.5
    with pytest.raises(RecordError, match="expected weights of 0 or 1"):
        collator(records[:2])
    assert collator(records[1:3])["labels"].shape[0] == 1


def test_keys_that_say_nothing_are_named_to_the_collator_as_to_the_trainer(toy_folder, screens, records):
    plain = PixelPruneCollator.from_pretrained(toy_folder, resize=SMALL, root=screens)
    named = PixelPruneCollator.from_pretrained(toy_folder, resize=SMALL, root=screens, ignore_keys=["mood", "rating"])
    odd = [records[0] | {"mood": "calm", "rating": 3}]
    with pytest.raises(RecordError, match="'mood', which is not read"):
        plain(odd)
    assert torch.equal(named(odd)["input_ids"], plain(records[:1])["input_ids"])
    with pytest.raises(RecordError, match="'taste', which is not read"):
        named([records[0] | {"taste": 1}])
    with pytest.raises(ValueError, match="part of the conversation itself"):
        PixelPruneCollator.from_pretrained(toy_folder, ignore_keys=["messages"])


def test_labels_are_the_supervised_tokens(tokenizer, toy_folder, screens, records):
    collator = PixelPruneCollator.from_pretrained(toy_folder, resize=SMALL, root=screens, dummy_image=False)
    row = collator(records[1:4])
    labels, ids = row["labels"][0], row["input_ids"][0]
    assert (labels[labels != -100] == ids[labels != -100]).all()
    answers = [record["messages"][1]["content"] + "<|im_end|>" for record in records[1:4]]
    assert tokenizer.decode(labels[labels != -100]) == "".join(answers)


def test_trains_in_the_hugging_face_trainer(toy_folder, screens, records, tmp_path):
    collator = PixelPruneCollator.from_pretrained(toy_folder, resize=SMALL, root=screens, pixels="blocks")
    model = Qwen3VLForConditionalGeneration.from_pretrained(toy_folder, dtype=torch.float32)
    take_blocks(model, collator.geometry)
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"), remove_unused_columns=False, per_device_train_batch_size=4, max_steps=12,
        learning_rate=3e-3, logging_steps=1, report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True,
        lr_scheduler_type="constant",
    )  # fmt: skip
    trainer = Trainer(model, arguments, data_collator=collator, train_dataset=records)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 12
    assert np.mean(losses[-3:]) < 0.8 * losses[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_blocks_are_normalised_in_the_model_to_the_same_bits(dtype, toy_folder, screens, records):
    collators = [
        PixelPruneCollator.from_pretrained(toy_folder, resize=SMALL, root=screens, pixels=pixels)
        for pixels in ("patches", "blocks")
    ]
    patches, blocks = (collator(records[:3]) for collator in collators)
    assert blocks["pixel_values"].dtype == torch.uint8
    assert 8 * blocks["pixel_values"].nbytes == patches["pixel_values"].nbytes
    model = Qwen3VLForConditionalGeneration.from_pretrained(toy_folder, dtype=dtype).eval()
    with torch.no_grad():
        expected = model(**patches).logits
        with pytest.raises(RuntimeError):  # a model that was not told: half the patches, whose positions do not fit
            model(**blocks)
        take_blocks(model, collators[0].geometry)
        assert torch.equal(model(**blocks).logits, expected)
        with pytest.raises(ValueError, match=r"expected pixel_values of \(K, 32, 32, 3\)"):
            model(**patches)


def test_pixels_have_two_forms(toy_folder):
    with pytest.raises(ValueError, match='expected "patches" or "blocks", got \'bytes\''):
        PixelPruneCollator.from_pretrained(toy_folder, pixels="bytes")


def test_works_in_a_plain_data_loader(toy_folder, screens, records):
    collator = PixelPruneCollator.from_pretrained(toy_folder, resize=SMALL, root=screens)
    loader = torch.utils.data.DataLoader(records, batch_size=5, collate_fn=collator)
    rows = list(loader)
    assert len(rows) == 5
    assert sum(int((row["labels"] != -100).sum()) for row in rows) > 0


def test_rows_without_an_image_get_one_outside_the_loss(toy_folder):
    question = [chat_row(None)]
    with_dummy = PixelPruneCollator.from_pretrained(toy_folder)
    without = PixelPruneCollator.from_pretrained(toy_folder, dummy_image=False)
    row, bare = with_dummy(question), without(question)
    assert "pixel_values" not in bare
    assert row["pixel_values"].shape[0] == 4
    assert row["input_ids"].shape[1] == bare["input_ids"].shape[1] + DUMMY_TOKENS
    assert int((row["labels"] != -100).sum()) == int((bare["labels"] != -100).sum())
    model = Qwen3VLForConditionalGeneration.from_pretrained(toy_folder, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(**row).loss, model(**bare).loss, rtol=1e-5, atol=1e-5)
    alone = with_dummy.pack([])
    assert alone.record_ids == (DUMMY_ID,)
    assert alone.num_supervised == 0


def test_dummy_sample_has_a_text_token_beside_the_image():
    for image_token_id in (0, 5):
        sample = dummy_sample(image_token_id)
        assert len(sample) == DUMMY_TOKENS
        assert (sample.input_ids == image_token_id).sum() == 1
        assert sample.num_supervised == 0


def test_settings_reach_the_images(toy_folder):
    record = chat_row(None)
    record["messages"][0]["content"].insert(0, {"type": "image", "image": draw_screen(0, 320, 256)})

    def num_patches(**settings):
        return len(PixelPruneCollator.from_pretrained(toy_folder, **settings)([record])["pixel_values"])

    full = num_patches(prune=PruneSettings(strategy="none"), resize=SMALL)
    assert full == 4 * 10 * 8
    assert num_patches(resize=SMALL) < full
    assert (
        num_patches(prune=PruneSettings(strategy="none"), resize=ResizeSettings(max_pixels=160 * 128, min_pixels=1))
        == 80
    )


def test_a_bad_record_is_an_error_not_a_hole(toy_folder, screens):
    collator = PixelPruneCollator.from_pretrained(toy_folder, root=screens)
    with pytest.raises(RecordError) as caught:
        collator([chat_row(None), chat_row("none.png")])
    assert caught.value.reason == "missing_file"


def test_what_nobody_thought_of_is_the_records_and_named_with_its_cause(toy_folder, monkeypatch):
    """A nesting that no code expects, and a fault of the code itself: neither ends the run of millions of others."""
    preparer = PixelPruneCollator.from_pretrained(toy_folder).preparer
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    nested = "x"
    for _ in range(3000):
        nested = {"a": nested}
    with pytest.raises(RecordError, match="RecursionError") as caught:
        preparer.prepare({"messages": turns, "tools": [{"name": "f", "parameters": nested}]}, None)
    assert caught.value.reason == "unexpected"
    fault = MemoryError("2 GB of text")
    monkeypatch.setattr(ChatEncoder, "steps", lambda self, record: (_ for _ in ()).throw(fault))
    with pytest.raises(RecordError, match=r"MemoryError: 2 GB of text \(test_collator\.py:\d+\)") as caught:
        preparer.prepare({"messages": turns}, None)
    assert caught.value.reason == "out_of_memory"
    assert caught.value.__cause__ is fault
