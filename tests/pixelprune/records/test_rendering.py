"""A chat template and a tokenizer called directly, against the wrappers of transformers that everybody else calls."""

import numpy as np
import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from pixelprune.text.rendering import Rendering, Tokenising
from tests.pixelprune.records.test_chat import MARKED, REASONING, REWRITING
from training.composition.toy import build_tokenizer

TEXTS = [
    "",
    "Where?",
    " a\n\nb ",
    "Où? 在哪里 🙂 e\u0301 \u00a0",
    "<|im_start|>user\nx<|im_end|>\n",
    "0123 4567 'll I'd {{ x }}",
]
IMAGE = [{"type": "image"}, {"type": "text", "text": "Where?"}]
CALL = [{"type": "function", "function": {"name": "f", "arguments": {"a": [1, None]}}}]
CONVERSATIONS = {
    "texts": [{"role": "user", "content": TEXTS[3]}, {"role": "assistant", "content": TEXTS[2]}],
    "parts": [{"role": "user", "content": IMAGE}, {"role": "assistant", "content": ""}],
    "reasoning": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "reasoning_content": "r"}],
    "calls": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": CALL}],
    "answer alone": [{"role": "assistant", "content": "a"}],
}
# What templates may see of a conversation, whole, and of what else they are given.
SEES_ALL = "{{ messages }}{{ tools }}{{ documents }}{{ add_generation_prompt }}{{ eos_token }}{{ x is defined }}"


@pytest.mark.parametrize("template", [None, MARKED, REASONING, REWRITING, SEES_ALL], ids=lambda t: str(t)[:12])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_conversation_is_rendered_as_transformers_does(template, name):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template or tokenizer.chat_template
    turns = CONVERSATIONS[name]
    rendering = Rendering(tokenizer)
    for options in ({}, {"add_generation_prompt": True}, {"tools": CALL}, {"tools": None, "enable_thinking": False}):
        arguments = {"chat_template": tokenizer.chat_template, **tokenizer.special_tokens_map, **options}
        try:
            ((text,), _) = render_jinja_template([turns], **arguments)
        except TypeError:  # a template that adds a list to a text
            with pytest.raises(TypeError):
                rendering.text(turns, **options)
            continue
        assert rendering.text(turns, **options) == text
    assert rendering.text([{"role": "user", "content": np.str_("q")}]) == rendering.text(
        [{"role": "user", "content": "q"}]
    )


def by_wrapper(tokenizer, text):
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return encoded["input_ids"], [list(span) for span in encoded["offset_mapping"]]


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_a_text_is_tokenised_as_transformers_does(text):
    tokenizer = build_tokenizer()
    tokenise = Tokenising(tokenizer)
    expected = by_wrapper(tokenizer, text)
    for leave in (
        lambda: None,
        lambda: tokenizer(["a", "b c d"], padding=True),
        lambda: tokenizer("a b c d", truncation=True, max_length=2),
        lambda: tokenizer(TEXTS[4], split_special_tokens=True),
    ):
        leave()  # what another caller sets stays set in the backend
        ids, characters = tokenise(text)
        assert (ids.tolist(), characters.tolist()) == expected
        assert ids.dtype == characters.dtype == np.int64
        assert characters.shape == (len(ids), 2)


def test_a_tokenizer_with_a_call_of_its_own_is_called_so():
    tokenizer = build_tokenizer()

    class Shouting(type(tokenizer)):
        def __call__(self, text, **options):
            return super().__call__(text.upper(), **options)

    tokenizer.__class__ = Shouting
    ids, _ = Tokenising(tokenizer)("there")
    assert tokenizer.decode(ids) == "THERE"
