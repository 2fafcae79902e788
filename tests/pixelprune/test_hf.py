"""Generation with pruned images against step-by-step decoding written out here, and against stock `generate`."""

from __future__ import annotations

import base64
import copy
import dataclasses
import io
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import GenerationConfig
from transformers.generation import BaseStreamer

from pixelprune.hf import generate, prefill_logits, prepare
from pixelprune.images.image import ImageError
from pixelprune.prompter import Prompter
from pixelprune.settings import PruneSettings, ResizeSettings
from tests.conftest import screen
from tests.pixelprune.generation_reference import (
    NUM_NEW,
    SMALL,
    decode_uncached,
    logits_of,
    padded_stock_prompts,
    stock_prompt,
    user,
)
from tests.pixelprune.reference import stock_processor

CONVERSATIONS = [
    user("Where is Save?", screen(4, 7)),
    user("What is 2 + 2?"),
    user("Compare them, please.", screen(4, 3, 1), screen(2, 7, 2)),
    user("Open the menu.", screen(5, 3, 3)),
]


def assert_decodes_as(generation, row, model, tokenizer, messages, sample) -> None:
    keeps = [image.selection.keep for image in sample.images]
    tokens, logits = decode_uncached(model, tokenizer, messages, keeps, NUM_NEW)
    assert len(set(tokens)) > 2, "a constant answer compares nothing"
    assert generation.token_ids[row] == tokens
    # A cache and padding give other matrix shapes, which round differently; logits are up to 6 in size.
    torch.testing.assert_close(logits_of(generation, row), logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("number", range(len(CONVERSATIONS)))
def test_pruned_generate_equals_uncached_step_by_step_decoding(number, lively, toy_tokenizer, prompter):
    inputs = prepare(prompter, CONVERSATIONS[number])
    assert inputs.num_kept_blocks < inputs.num_blocks or not inputs.num_blocks
    generation = generate(lively, inputs, max_new_tokens=NUM_NEW, output_logits=True)
    assert_decodes_as(generation, 0, lively, toy_tokenizer, CONVERSATIONS[number], inputs.samples[0])


def test_a_left_padded_batch_of_four_equals_uncached_decoding_of_each(lively, toy_tokenizer, prompter):
    inputs = prepare(prompter, CONVERSATIONS)
    assert len({len(sample) for sample in inputs.samples}) == 4
    generation = generate(lively, inputs, max_new_tokens=NUM_NEW, output_logits=True)
    for row, (messages, sample) in enumerate(zip(CONVERSATIONS, inputs.samples, strict=True)):
        assert_decodes_as(generation, row, lively, toy_tokenizer, messages, sample)


def test_positions_of_generated_tokens_continue_both_counts(monkeypatch, lively, prompter):
    """Row 0 counts the tokens of the pruned row; rows 1-3 go on where the unpruned sequence ended."""
    model, seen = copy.deepcopy(lively), []
    forward = model.model.language_model.forward

    def record(*args, **kwargs):
        seen.append(kwargs["position_ids"])
        return forward(*args, **kwargs)

    monkeypatch.setattr(model.model.language_model, "forward", record)
    inputs = prepare(prompter, CONVERSATIONS)
    generate(model, inputs, max_new_tokens=NUM_NEW)
    for row, sample in enumerate(inputs.samples):
        assert torch.equal(seen[0][1:, row, -len(sample) :], torch.from_numpy(sample.position_ids))
        assert seen[0][0, row, -len(sample) :].tolist() == list(range(len(sample)))
        for step, positions in enumerate(seen[1:]):
            assert positions[:, row, 0].tolist() == [len(sample) + step, *[sample.next_position + step] * 3]
    assert len(seen) == NUM_NEW
    unpruned = prepare(dataclasses.replace(prompter, prune=PruneSettings("none")), CONVERSATIONS).samples
    assert [s.next_position for s in inputs.samples] == [s.next_position for s in unpruned]


def test_the_reference_notices_a_position_that_is_off_by_one(lively, toy_tokenizer, prompter):
    """The comparison above would fail on a wrong position of generated tokens: the logits move far beyond it."""
    inputs = prepare(prompter, CONVERSATIONS[0])
    right = generate(lively, inputs, max_new_tokens=NUM_NEW, output_logits=True)
    sample = inputs.samples[0]
    positions = sample.position_ids.copy()
    positions[:, -1] += 1
    shifted = dataclasses.replace(sample, position_ids=positions, next_position=sample.next_position + 1)
    off = generate(lively, dataclasses.replace(inputs, samples=[shifted]), max_new_tokens=NUM_NEW, output_logits=True)
    assert (logits_of(off) - logits_of(right)).abs().max() > 1e-2


@pytest.mark.parametrize("number", range(len(CONVERSATIONS)))
def test_keep_all_generate_is_stock_generate_bit_for_bit(number, lively, toy_tokenizer, toy_folder):
    stock = lively.generate(
        **stock_prompt(toy_tokenizer, CONVERSATIONS[number]),
        max_new_tokens=NUM_NEW,
        return_dict_in_generate=True,
        output_logits=True,
    )
    ours = generate(
        lively,
        prepare(toy_folder, CONVERSATIONS[number], prune="none", resize=SMALL),
        max_new_tokens=NUM_NEW,
        output_logits=True,
    )
    assert ours.token_ids[0] == stock.sequences[0, -NUM_NEW:].tolist()
    assert torch.equal(logits_of(ours), torch.cat(stock.logits))


def test_a_keep_all_batch_is_stock_generate_bit_for_bit(lively, toy_tokenizer, toy_folder):
    stock = lively.generate(**padded_stock_prompts(toy_tokenizer, CONVERSATIONS), max_new_tokens=NUM_NEW)
    ours = generate(lively, prepare(toy_folder, CONVERSATIONS, prune="none", resize=SMALL), max_new_tokens=NUM_NEW)
    assert ours.token_ids == stock[:, -NUM_NEW:].tolist()


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": True, "temperature": 1.3, "top_p": 0.9},
        {"do_sample": True, "num_return_sequences": 3},
        {"num_beams": 3, "repetition_penalty": 1.2},
    ],
    ids=["sampling", "several samples", "beams"],
)
def test_other_decoding_is_the_stock_method_with_the_same_seed(settings, lively, toy_tokenizer, toy_folder):
    torch.manual_seed(5)
    stock = lively.generate(
        **padded_stock_prompts(toy_tokenizer, CONVERSATIONS[:3]), max_new_tokens=NUM_NEW, **settings
    )
    inputs = prepare(toy_folder, CONVERSATIONS[:3], prune="none", resize=SMALL)
    torch.manual_seed(5)
    ours = generate(lively, inputs, max_new_tokens=NUM_NEW, **settings)
    assert ours.token_ids == stock[:, -NUM_NEW:].tolist()


def test_a_streamer_receives_the_prompt_and_then_every_token(lively, prompter):
    class Recorder(BaseStreamer):
        def __init__(self):
            self.received: list[list[int]] = []
            self.ended = False

        def put(self, value):
            self.received.append(value.reshape(-1).tolist())

        def end(self):
            self.ended = True

    recorder, inputs = Recorder(), prepare(prompter, CONVERSATIONS[0])
    generation = generate(lively, inputs, max_new_tokens=NUM_NEW, streamer=recorder)
    assert recorder.ended
    assert recorder.received == [inputs.samples[0].input_ids.tolist(), *([token] for token in generation.token_ids[0])]


def test_answers_end_at_their_own_end_token(lively, prompter):
    """Rows that stop early are padded by the stock method until the longest is done."""
    inputs = prepare(prompter, CONVERSATIONS)
    free = generate(lively, inputs, max_new_tokens=NUM_NEW)
    end = free.token_ids[0][2]
    ended = generate(lively, inputs, max_new_tokens=NUM_NEW, eos_token_id=end)
    expected = [row[: row.index(end) + 1] if end in row else row for row in free.token_ids]
    assert ended.token_ids == expected
    assert len(ended.token_ids[0]) <= 3


def test_prefill_logits_are_those_of_the_first_generated_token(lively, prompter):
    inputs = prepare(prompter, CONVERSATIONS)
    first = generate(lively, inputs, max_new_tokens=1, output_logits=True).output.logits[0]
    torch.testing.assert_close(prefill_logits(lively, inputs), first, atol=1e-5, rtol=1e-5)


def test_a_bfloat16_model_takes_the_same_inputs(lively, prompter):
    model = copy.deepcopy(lively).to(torch.bfloat16)
    generation = generate(model, prepare(prompter, CONVERSATIONS), max_new_tokens=2, output_logits=True)
    reference = prefill_logits(lively, prepare(prompter, CONVERSATIONS))
    assert [len(row) for row in generation.token_ids] == [2] * 4
    distance = (generation.output.logits[0] - reference).norm() / reference.norm()
    assert distance < 0.05


def test_the_model_is_left_as_it_was(toy_model, prompter):
    before = {name: id(module.forward.__func__) for name, module in toy_model.named_modules()}
    generate(toy_model, prepare(prompter, CONVERSATIONS[0]), max_new_tokens=2)
    assert {name: id(module.forward.__func__) for name, module in toy_model.named_modules()} == before
    assert "generate" not in vars(toy_model)


# --- preparing ---


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


def test_every_way_to_give_an_image_gives_the_same_prompt(tmp_path, prompter):
    image = screen(3, 5)
    (tmp_path / "page.png").write_bytes(png(image))
    encoded = base64.b64encode(png(image)).decode()
    parts = [
        {"type": "image", "image": image},
        {"type": "image", "image": Image.fromarray(image)},
        {"type": "image", "image": png(image)},
        {"type": "image", "path": str(tmp_path / "page.png")},
        {"type": "image", "image": tmp_path / "page.png"},
        {"type": "image", "url": f"file://{tmp_path}/page.png"},
        {"type": "image", "base64": encoded},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}},
        {"image": image},
    ]
    for part in parts:
        (sample,) = prepare(prompter, [{"role": "user", "content": [part, "Where?"]}]).samples
        assert np.array_equal(sample.images[0].selection.keep, _keep(image))
        assert sample.input_ids.tolist() == prepare(prompter, user("Where?", image)).samples[0].input_ids.tolist()


def _keep(image: np.ndarray) -> np.ndarray:
    from pixelprune.selection import select

    return select(image).keep


def test_retain_ratio_is_kept_over_all_blocks(prompter):
    inputs = prepare(prompter, CONVERSATIONS)
    images = [screen(4, 7), screen(4, 3, 1), screen(2, 7, 2), screen(5, 3, 3)]
    kept = sum(int(_keep(image).sum()) for image in images)
    assert (inputs.num_kept_blocks, inputs.num_blocks) == (kept, 28 + 12 + 14 + 15)
    assert inputs.retain_ratio == kept / 69
    assert prepare(prompter, CONVERSATIONS[1]).retain_ratio == 1.0


def test_settings_come_from_the_trained_folder_then_from_its_preprocessor(toy_folder, tmp_path):
    assert Prompter.load(toy_folder).resize == ResizeSettings(256 * 256, 4096 * 4096)
    assert Prompter.load(toy_folder).prune == PruneSettings()
    folder = tmp_path / "trained"
    shutil.copytree(toy_folder, folder)
    preprocessor = json.loads((folder / "preprocessor_config.json").read_text())
    preprocessor |= {"size": {"shortest_edge": 4096, "longest_edge": 8192}}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    assert Prompter.load(folder).resize == ResizeSettings(4096, 8192)
    trained = {"prune": {"strategy": "raster", "threshold": 0.1}, "resize": {"min_pixels": 1024, "max_pixels": 2048}}
    (folder / "pixelprune.json").write_text(json.dumps(trained))
    assert Prompter.load(folder).prune == PruneSettings("raster", threshold=0.1)
    assert Prompter.load(folder).resize == ResizeSettings(1024, 2048)
    assert Prompter.load(folder, prune="none", resize=SMALL).prune == PruneSettings("none")
    assert Prompter.load(folder, prune="none", resize=SMALL).resize == SMALL
    assert not Prompter.load(folder).grounding_tokens
    (folder / "pixelprune.json").write_text(json.dumps(trained | {"grounding_tokens": True}))
    assert Prompter.load(folder).grounding_tokens
    assert not Prompter.load(folder, grounding_tokens=False).grounding_tokens
    (folder / "pixelprune.json").write_text(json.dumps(trained | {"grounding_tokens": "yes"}))
    with pytest.raises(ValueError, match="expected true or false, got 'yes'"):
        Prompter.load(folder)
    (folder / "pixelprune.json").write_text('{"prune": {"stratgy": "raster"}, "resize": {}}')
    with pytest.raises(ValueError, match=r"pixelprune\.json.*stratgy"):
        Prompter.load(folder)


def test_a_processor_gives_what_its_folder_gives(toy_folder, toy_tokenizer):
    class Processor:
        tokenizer = toy_tokenizer
        image_processor = stock_processor(256 * 256, 4096 * 4096)

    ours, folder = Prompter.load(Processor()), Prompter.load(toy_folder)
    for name in ("chat_template", "image_token_id", "prune", "resize", "image_mean", "image_std"):
        assert getattr(ours, name) == getattr(folder, name), name


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([], "expected a conversation"),
        ("Where is Save?", "expected a conversation"),
        ([{"content": "hello"}], "message 1: expected a dict with 'role'"),
        ([{"role": "user", "content": 5}], "message 1: expected text as a string, got 5"),
        ([{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}], "'video' are not supported"),
        (
            [{"role": "user", "content": [{"type": "image"}]}],
            "expected an image part with one of image, image_url",
        ),
        (
            [{"role": "user", "content": [{"type": "image", "image": "https://a.org/b.png"}]}],
            "must be downloaded",
        ),
        ([{"role": "user", "content": [{"type": "image", "base64": "?"}]}], "base64 text is damaged"),
        (user("Where?", np.zeros((40, 40, 3))), "expected uint8 \\(H, W\\)"),
        (user("Where is <|image_pad|>?", screen(2, 2)), "the text contains '<|image_pad|>'"),
        ([user("Fine."), user("Where?", "nowhere.png")], "conversation 2: image 1 .* nowhere.png: no such file"),
    ],
)
def test_unusable_messages_are_refused_in_one_line(messages, expected, prompter):
    with pytest.raises(ValueError, match=expected.replace("|", r"\|").replace("?", r"\?")) as refused:
        prepare(prompter, messages)
    assert "\n" not in str(refused.value)


def test_an_unusable_image_keeps_its_reason(prompter):
    with pytest.raises(ImageError) as refused:
        prepare(prompter, user("Where?", b"not a picture"))
    assert refused.value.reason == "not_an_image"


def test_a_generation_config_keeps_its_say(lively, prompter):
    inputs = prepare(prompter, CONVERSATIONS[0])
    expected = generate(lively, inputs, max_new_tokens=3).token_ids
    config = GenerationConfig(max_new_tokens=3, pad_token_id=5)
    assert generate(lively, inputs, generation_config=config).token_ids == expected
    assert generate(lively, inputs, generation_config=config, max_new_tokens=2).token_ids == [expected[0][:2]]
    assert generate(lively, inputs, max_length=len(inputs.samples[0]) + 3).token_ids == expected
    assert (config.max_new_tokens, config.return_dict_in_generate) == (3, None), "the caller's object is left alone"


def test_without_any_length_256_tokens_are_generated(lively, prompter):
    assert len(generate(lively, prepare(prompter, user("?"))).token_ids[0]) == 256


def test_a_model_in_training_mode_is_refused(lively, prompter):
    """With gradient checkpointing, the stock method would drop the cache and go on from the last token alone."""
    model = copy.deepcopy(lively).train()
    with pytest.raises(ValueError, match=r"training mode; call model\.eval\(\) first"):
        generate(model, prepare(prompter, CONVERSATIONS[0]), max_new_tokens=2)


def test_chunked_prefill_gives_the_same_answer(lively, prompter):
    inputs = prepare(prompter, CONVERSATIONS)
    expected = generate(lively, inputs, max_new_tokens=NUM_NEW).token_ids
    assert generate(lively, inputs, max_new_tokens=NUM_NEW, prefill_chunk_size=7).token_ids == expected


def test_an_adapter_around_the_model_changes_nothing_here(lively, prompter):
    peft = pytest.importorskip("peft")
    inputs = prepare(prompter, CONVERSATIONS)
    expected = generate(lively, inputs, max_new_tokens=NUM_NEW).token_ids
    settings = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2)  # starts as the identity
    wrapped = peft.get_peft_model(copy.deepcopy(lively), settings).eval()
    assert generate(wrapped, inputs, max_new_tokens=NUM_NEW).token_ids == expected


def test_arguments_made_here_and_other_models_are_refused(lively, prompter):
    inputs = prepare(prompter, CONVERSATIONS[0])
    with pytest.raises(ValueError, match="position_ids: made from the prepared inputs"):
        generate(lively, inputs, position_ids=None)
    with pytest.raises(ValueError, match="prompt_lookup_num_tokens: assisted decoding is not supported"):
        generate(lively, inputs, prompt_lookup_num_tokens=3)
    other = copy.deepcopy(lively)
    other.config.image_token_id = 1
    with pytest.raises(ValueError, match="the model expects 1; prepare them with the model's own folder"):
        generate(other, inputs)
    with pytest.raises(ValueError, match="a Prompter brings its own"):
        prepare(prompter, CONVERSATIONS[0], prune="none")
    with pytest.raises(ValueError, match="expected a model folder, a hub id or a processor"):
        prepare(5, CONVERSATIONS[0])
    with pytest.raises(ValueError, match="is not a loadable model folder"):
        prepare("./no/such/folder", CONVERSATIONS[0])
