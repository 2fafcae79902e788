"""Fixtures of generation: a toy model whose answers vary, and what prepares its prompts."""

from __future__ import annotations

import copy

import pytest
import torch

from pixelprune.prompter import Prompter
from tests.pixelprune.generation_reference import SMALL


@pytest.fixture(scope="session")
def lively(toy_model):
    """The toy model with larger weights: its greedy answers depend on the prompt and do not repeat one token."""
    model = copy.deepcopy(toy_model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embed_tokens" not in name:
                parameter.mul_(3)
    model.generation_config.eos_token_id = None  # full length, so that all tokens are compared
    return model


@pytest.fixture(scope="session")
def prompter(toy_folder) -> Prompter:
    return Prompter.load(toy_folder, resize=SMALL)
