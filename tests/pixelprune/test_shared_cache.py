"""Many questions about one screenshot in a batch: prefilled once, answered as alone."""

from __future__ import annotations

import copy

import pytest
import torch

from pixelprune.hf import generate, prepare
from pixelprune.prompter import Prompter
from tests.conftest import screen
from tests.kernels import needs_plain_layers
from tests.pixelprune.generation_reference import NUM_NEW, SMALL, logits_of, user

ASKED = ["Where is Save?", "And what is the title of it?", "Open", "Is it on?"]

BATCHES = {
    "one screenshot": [user(text, screen(10, 12)) for text in ASKED],
    "two screenshots and none": [
        *(user(text, screen(10, 12, number % 2)) for number, text in enumerate(ASKED)),
        user("What is 2 + 2?"),
    ],
    "another picture behind it": [user(text, screen(10, 12), screen(2, 3, n)) for n, text in enumerate(ASKED)],
}


@pytest.fixture
def computed(monkeypatch):
    """Tokens that the language model computes before the first new one, and patches of the vision tower."""

    def watch(model):
        counts = {"tokens": 0, "patches": 0}
        text, vision = model.model.language_model.forward, model.model.visual.forward

        def count_tokens(*args, **kwargs):
            rows, columns = kwargs["inputs_embeds"].shape[:2]
            counts["tokens"] += rows * columns if columns > 1 else 0
            return text(*args, **kwargs)

        def count_patches(pixels, *args, **kwargs):
            counts["patches"] += len(pixels)
            return vision(pixels, *args, **kwargs)

        monkeypatch.setattr(model.model.language_model, "forward", count_tokens)
        monkeypatch.setattr(model.model.visual, "forward", count_patches)
        return counts

    return watch


def assert_answers_as_alone(model, prompter, messages, counts, **options) -> dict[str, int]:
    """What the batch computed, after comparing its tokens and logits with those of each prompt alone."""
    batch = generate(model, prepare(prompter, messages), max_new_tokens=NUM_NEW, output_logits=True, **options)
    together = dict(counts)
    for row, one in enumerate(messages):
        alone = generate(model, prepare(prompter, one), max_new_tokens=NUM_NEW, output_logits=True, **options)
        assert batch.token_ids[row] == alone.token_ids[0]
        # A cache and padding give other matrix shapes, which round differently; logits are up to 6 in size.
        torch.testing.assert_close(logits_of(batch, row), logits_of(alone), atol=1e-4, rtol=1e-4)
    return together


@pytest.mark.parametrize("batch", BATCHES)
def test_a_batch_answers_as_each_prompt_alone(batch, lively, prompter, computed):
    model, messages = copy.deepcopy(lively), BATCHES[batch]
    counts = computed(model)
    together = assert_answers_as_alone(model, prompter, messages, counts)
    inputs = prepare(prompter, messages)
    assert together["tokens"] < 0.8 * len(messages) * max(map(len, inputs.samples))
    assert together["patches"] < 4 * inputs.num_kept_blocks


def test_one_screenshot_is_prefilled_once(lively, prompter, computed):
    model, inputs = copy.deepcopy(lively), prepare(prompter, BATCHES["one screenshot"])
    counts = computed(model)
    generate(model, inputs, max_new_tokens=2)
    lengths = [len(sample) for sample in inputs.samples]
    prefix = next(n for n, ids in enumerate(zip(*(sample.input_ids for sample in inputs.samples), strict=False))
                  if len(set(ids)) > 1)  # fmt: skip
    assert counts["tokens"] == prefix + len(lengths) * (max(lengths) - prefix)
    assert counts["patches"] == 4 * inputs.samples[0].images[0].selection.num_kept


def test_a_hybrid_encodes_the_picture_once_and_prefills_each_row(tmp_path, computed):
    from transformers import AutoModelForImageTextToText

    from training.composition.toy import build_toy_model

    needs_plain_layers("qwen3_5")
    folder = build_toy_model(tmp_path / "model", family="qwen3_5")
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    model.generation_config.eos_token_id = None
    prompter = Prompter.load(folder, resize=SMALL)
    messages = BATCHES["one screenshot"][:3]
    counts = computed(model)
    together = assert_answers_as_alone(model, prompter, messages, counts)
    inputs = prepare(prompter, messages)
    assert together["tokens"] == 3 * max(map(len, inputs.samples))
    assert together["patches"] == 4 * inputs.samples[0].images[0].selection.num_kept


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"use_cache": False}, {"num_return_sequences": 2}])
def test_what_keeps_another_cache_is_generated_as_without_sharing(options, lively, prompter, computed):
    model, inputs = copy.deepcopy(lively), prepare(prompter, BATCHES["one screenshot"][:2])
    if "num_return_sequences" in options:
        options = options | {"do_sample": True, "top_k": 1}
    batch = generate(model, inputs, max_new_tokens=4, **options)
    counts = computed(model)
    again = generate(model, inputs, max_new_tokens=4, **options)
    assert batch.token_ids == again.token_ids
    assert counts["tokens"] >= 2 * max(map(len, inputs.samples))
