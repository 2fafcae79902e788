"""What two answers of a checkpoint say of each other; the command itself is run in tests/vllm."""

from __future__ import annotations

import importlib.util

import pytest

from pixelprune.__main__ import main
from pixelprune.extras import require_transformers
from pixelprune.vllm.answers import Answer
from pixelprune.vllm.parity import Pair


def pair(trained: list[int], served: list[int], gaps: list[float], served_tokens: int = 50) -> Pair:
    one = Answer(50, "", trained, [-1.0] * len(trained))
    other = Answer(served_tokens, "", served, [-1.0 - gap for gap in gaps])
    return Pair("a.png", one, other)


def test_verdicts():
    assert pair([1, 2, 3], [1, 2, 3], [0, 0.05, 0]).verdict(0.1) == "same"
    assert pair([1, 2, 3], [1, 7, 9], [0, 0.05, 5.0]).verdict(0.1) == "tie at token 2"
    assert pair([1, 2], [1, 2, 4], [0, 0, 0]).verdict(0.1) == "tie at token 3"
    assert pair([1, 2, 3], [1, 7, 9], [0, 0.2, 0]).verdict(0.1) == "DIFFERENT: log-probabilities by 0.200"
    assert pair([1, 2, 3], [1, 2, 3], [0, 0.2, 0]).verdict(0.1) == "DIFFERENT: log-probabilities by 0.200"
    assert pair([1], [1], [0], 92).verdict(0.1) == "DIFFERENT: 50 prompt tokens trained, 92 served"


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vllm is installed")
def test_without_vllm_it_says_what_is_missing(capsys, toy_folder, tmp_path):
    assert main(["parity", str(toy_folder), str(tmp_path / "a.png")]) == 2
    assert "parity needs vllm" in " ".join(capsys.readouterr().err.split())


def test_older_transformers_are_refused_by_name():
    with pytest.raises(ImportError, match=r"a packed row needs transformers >= 99\.0, got 5\..*pip install"):
        require_transformers("99.0", "a packed row")
    require_transformers("5.0", "anything")
