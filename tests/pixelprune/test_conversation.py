"""Turns that reuse the cache against a fresh, uncached computation of the whole conversation."""

from __future__ import annotations

import copy
import dataclasses
import logging

import numpy as np
import pytest
import torch

from pixelprune.conversation import Conversation
from pixelprune.hf import generate, prepare
from pixelprune.prompter import Prompter
from tests.conftest import screen
from tests.pixelprune.generation_reference import NUM_NEW, SMALL, logits_from_the_start, logits_of

TURNS = [
    [{"type": "image", "image": screen(4, 7)}, {"type": "text", "text": "Where is Save?"}],
    "And the search field?",
    [
        {"type": "text", "text": "Now look here"},
        {"type": "image", "image": screen(5, 3, 3)},
        {"type": "image", "image": screen(2, 4, 4)},
        {"type": "text", "text": "and compare."},
    ],
    "Thank you. Which was wider?",
]


def test_every_turn_equals_a_fresh_uncached_pass_over_the_whole_conversation(lively, toy_tokenizer, prompter):
    conversation = Conversation(lively, prompter)
    ids: list[int] = []
    images: list[np.ndarray] = []
    for number, turn in enumerate(TURNS):
        answer = conversation.ask(turn, max_new_tokens=NUM_NEW, output_logits=True)
        # The row by the template's definition: the turn (closing the last answer), the header, the answer's tokens.
        parts = [{"type": "text", "text": turn}] if isinstance(turn, str) else turn
        images += [part["image"] for part in parts if "image" in part]
        content = "".join(
            "<|vision_start|><|image_pad|><|vision_end|>" if "image" in part else part["text"] for part in parts
        )
        closing = "<|im_end|>\n" if number else ""
        text = f"{closing}<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n"
        ids += toy_tokenizer(text, add_special_tokens=False)["input_ids"] + answer.token_ids[0]
        keeps = [image.selection.keep for image in conversation._row.images]
        expected = logits_from_the_start(lively, toy_tokenizer, ids, images, keeps)
        assert len(expected) == conversation.num_tokens
        assert expected[-NUM_NEW - 1 : -1].argmax(-1).tolist() == answer.token_ids[0]
        torch.testing.assert_close(logits_of(answer), expected[-NUM_NEW - 1 : -1], atol=1e-4, rtol=1e-4)
        assert conversation.num_cached_tokens == conversation.num_tokens - 1
    assert 0 < conversation.retain_ratio < 1
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"] * len(TURNS)


def count_computed(monkeypatch, model) -> dict[str, int]:
    """Tokens the language model and blocks the vision tower compute."""
    computed = {"tokens": 0, "blocks": 0}
    text_forward, vision_forward = model.model.language_model.forward, model.model.visual.forward

    def text(*args, **kwargs):
        computed["tokens"] += kwargs["inputs_embeds"].shape[1]
        return text_forward(*args, **kwargs)

    def vision(pixels, *args, **kwargs):
        computed["blocks"] += len(pixels) // 4
        return vision_forward(pixels, *args, **kwargs)

    monkeypatch.setattr(model.model.language_model, "forward", text)
    monkeypatch.setattr(model.model.visual, "forward", vision)
    return computed


def test_only_new_tokens_and_new_images_are_computed(monkeypatch, lively, prompter):
    model = copy.deepcopy(lively)
    computed = count_computed(monkeypatch, model)
    conversation = Conversation(model, prompter)
    for turn in TURNS:
        before_tokens, before_blocks = conversation.num_cached_tokens, len(_kept(conversation))
        computed.update(tokens=0, blocks=0)
        conversation.ask(turn, max_new_tokens=NUM_NEW)
        assert computed["tokens"] == conversation.num_cached_tokens - before_tokens
        assert computed["blocks"] == len(_kept(conversation)) - before_blocks


def _kept(conversation: Conversation) -> np.ndarray:
    return np.concatenate([np.empty((0, 32, 32, 3)), *(image.blocks for image in conversation._row.images)])


def test_the_first_turn_is_what_generate_says(lively, prompter):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": TURNS[0]}]
    expected = generate(lively, prepare(prompter, messages), max_new_tokens=NUM_NEW)
    assert Conversation(lively, prompter).ask(messages, max_new_tokens=NUM_NEW).token_ids == expected.token_ids


def test_an_answer_closed_by_its_end_token_is_not_closed_twice(lively, toy_tokenizer, prompter):
    """Whatever token ends the answer, the template's own end token stands in the row, once."""
    conversation = Conversation(lively, prompter)
    free = generate(lively, prepare(prompter, [{"role": "user", "content": TURNS[0]}]), max_new_tokens=NUM_NEW)
    end = free.token_ids[0][3]
    conversation.ask(TURNS[0], max_new_tokens=NUM_NEW, eos_token_id=end)
    num_tokens = conversation.num_tokens
    assert conversation.num_cached_tokens == num_tokens
    conversation.ask(TURNS[1], max_new_tokens=1)
    tail = conversation._row.input_ids[num_tokens:].tolist()
    text = "<|im_end|>\n<|im_start|>user\nAnd the search field?<|im_end|>\n<|im_start|>assistant\n"
    assert tail[:-1] == toy_tokenizer(text)["input_ids"]


def test_repetition_penalty_sees_the_whole_conversation(lively, toy_tokenizer, prompter):
    conversation = Conversation(lively, prompter)
    first = conversation.ask(TURNS[0], max_new_tokens=NUM_NEW)
    second = conversation.ask(TURNS[1], max_new_tokens=1, repetition_penalty=1e4, output_scores=True)
    scores = second.output.scores[0][0]
    penalised = torch.tensor(sorted(set(first.token_ids[0])))
    # A penalty of 1e4 crushes positive scores and multiplies negative ones: none stays of ordinary size.
    assert bool(((scores[penalised].abs() < 1e-2) | (scores[penalised] < -10)).all())


def test_a_template_that_rewrites_earlier_answers_is_computed_from_the_start(lively, prompter, caplog):
    """As reasoning templates do, which drop the thoughts of earlier turns."""
    rewritten = "(render(message.content) | upper if message.role == 'assistant' else render(message.content))"
    template = prompter.chat_template.replace("render(message.content)", rewritten)
    shouting = dataclasses.replace(prompter, chat_template=template)
    conversation = Conversation(lively, shouting)
    conversation.ask(TURNS[0], max_new_tokens=NUM_NEW)
    with caplog.at_level(logging.INFO):
        answer = conversation.ask(TURNS[1], max_new_tokens=NUM_NEW)
    assert "computed from the start" in caplog.text
    fresh = generate(lively, prepare(shouting, conversation.messages[:-1]), max_new_tokens=NUM_NEW)
    assert answer.token_ids == fresh.token_ids


def test_a_failed_turn_leaves_the_conversation_usable(lively, prompter):
    def fail(*_):
        raise RuntimeError("out of memory")

    steady, shaken = Conversation(lively, prompter), Conversation(lively, prompter)
    for conversation in (steady, shaken):
        conversation.ask(TURNS[0], max_new_tokens=NUM_NEW)
    with pytest.raises(RuntimeError, match="out of memory"):
        shaken.ask(TURNS[1], max_new_tokens=NUM_NEW, stopping_criteria=[fail])
    assert shaken.messages == steady.messages
    assert shaken.num_cached_tokens == 0
    expected = steady.ask(TURNS[2], max_new_tokens=NUM_NEW)
    assert shaken.ask(TURNS[2], max_new_tokens=NUM_NEW).token_ids == expected.token_ids
    with pytest.raises(ValueError, match="no such file"):
        shaken.ask([{"type": "image", "image": "nowhere.png"}])
    assert shaken.num_cached_tokens == shaken.num_tokens - 1


def test_an_answer_never_contains_an_image_placeholder(lively, prompter):
    eager = generate(lively, prepare(prompter, [{"role": "user", "content": "?"}]), max_new_tokens=1)
    assert eager.token_ids
    model = copy.deepcopy(lively)
    with torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
        wanted = model.lm_head.weight[prompter.image_token_id]
        wanted.copy_(100 * model.lm_head.weight[eager.token_ids[0][0]])
    question = [{"role": "user", "content": "?"}]
    assert generate(model, prepare(prompter, question), max_new_tokens=1).token_ids == [[prompter.image_token_id]]
    assert prompter.image_token_id not in Conversation(model, prompter).ask("?", max_new_tokens=4).token_ids[0]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"num_beams": 2}, "num_beams=2: a conversation continues one sequence"),
        ({"num_return_sequences": 2, "do_sample": True}, "num_return_sequences=2"),
        ({"use_cache": False}, "use_cache=False: a conversation lives in its cache"),
        ({"past_key_values": None}, "past_key_values: made from the prepared inputs"),
    ],
)
def test_what_a_conversation_cannot_do_is_refused(settings, expected, lively, prompter):
    with pytest.raises(ValueError, match=expected):
        Conversation(lively, prompter).ask("Hello.", **settings)


def test_it_can_be_opened_on_a_model_folder(lively, toy_folder):
    conversation = Conversation(lively, toy_folder, resize=SMALL)
    assert isinstance(conversation.prompter, Prompter)
    assert conversation.ask("Hello.", max_new_tokens=2).text == conversation.messages[-1]["content"]
