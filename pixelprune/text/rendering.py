"""A tokenizer and its chat template called for one conversation after another, without what their wrappers do per call.

Millions of short conversations are indexed, and the wrappers cost as much as the work: `render_jinja_template` copies
its arguments and sets up options that are not used here, the tokenizer's `__call__` makes dictionaries of lists for a
batch of one. What is left out changes nothing: turns of plain texts are rendered by the same compiled template, texts
go to the same backend. Everything else takes the wrappers' way.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

__all__ = ["Rendering", "Tokenising"]

Turns = list[dict[str, Any]]
_PLAIN_KEYS = {"role", "content"}


class Rendering:
    """Conversations as text, by a tokenizer's chat template."""

    def __init__(self, tokenizer: Any):
        self._template: str = tokenizer.chat_template
        self._special: dict[str, Any] = dict(tokenizer.special_tokens_map)
        # Not part of transformers' interface: a release without it is as right, and slower.
        self._compile = getattr(chat_template_utils, "_compile_jinja_template", None)

    def text(self, turns: Turns, **kwargs: Any) -> str:
        """Raises jinja2.TemplateError for what the template refuses."""
        if self._compile is None or kwargs.get("tools") or not all(map(_is_plain, turns)):
            return str(self.text_and_marks(turns, **kwargs)[0])
        arguments = {"tools": None, "documents": None, "add_generation_prompt": False} | kwargs
        return str(self._compile(self._template).render(messages=turns, **arguments, **self._special))

    def text_and_marks(self, turns: Turns, **kwargs: Any) -> tuple[str, Any]:
        """The text, and with return_assistant_tokens_mask the characters within its {% generation %} marks."""
        texts, marks = chat_template_utils.render_jinja_template(
            conversations=[turns], chat_template=self._template, **self._special, **kwargs
        )
        return texts[0], marks[0] if marks else []


class Tokenising:
    """Texts as token ids, with the characters that each token stands for."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        kind = type(tokenizer)
        self._is_stock = all(
            getattr(kind, name, None) is getattr(PreTrainedTokenizerFast, name, 0)
            for name in ("__call__", "_encode_plus")
        )

    def __call__(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids int64 (n,) and characters int64 (n, 2), start and end. Nothing is added to the text, cut, or padded."""
        backend = self._tokenizer.backend_tokenizer
        if self._is_stock and self._is_as_called(backend):
            encoding = backend.encode(text, add_special_tokens=False)
            ids, offsets = encoding.ids, encoding.offsets
        else:
            encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        return np.array(ids, dtype=np.int64), np.array(offsets, dtype=np.int64).reshape(-1, 2)

    def _is_as_called(self, backend: Any) -> bool:
        """Whether another caller has left the backend as a call without padding and truncation would set it."""
        is_whole = backend.truncation is None and backend.padding is None
        return is_whole and backend.encode_special_tokens == self._tokenizer.split_special_tokens


def _is_plain(turn: dict[str, Any]) -> bool:
    """Whether a turn is a role and texts alone: other keys have other names in some templates, and other objects have
    methods that no template may reach; `render_jinja_template` sees to both."""
    content = turn.get("content")
    texts = [content] if type(content) is not list else [text for part in content for text in part.values()]
    return turn.keys() == _PLAIN_KEYS and all(type(text) is str for text in (*texts, turn["role"]))
