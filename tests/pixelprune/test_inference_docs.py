"""docs/inference.md against the code it describes."""

from __future__ import annotations

import re
from pathlib import Path

import pixelprune.conversation
import pixelprune.hf
import pixelprune.prompter

DOCS = Path(__file__).parents[2] / "docs" / "inference.md"


def test_names_in_code_blocks_exist():
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert len(blocks) >= 4
    for block in blocks:
        compile(block, str(DOCS), "exec")
        for module, names in re.findall(r"from (pixelprune\.\w+) import (.+)", block):
            for name in names.split(", "):
                assert hasattr(__import__(module, fromlist=[name]), name), f"{module}.{name}"


def test_the_parameters_it_names_are_those_of_prepare():
    import inspect

    named = {
        "prune",
        "resize",
        "tools",
        "template_kwargs",
        "grounding_tokens",
        "trust_remote_code",
        "messages",
        "source",
    }
    assert set(inspect.signature(pixelprune.hf.prepare).parameters) == named
    text = DOCS.read_text()
    assert all(name in text for name in named)
