"""A toy tokenizer, and a small data set of screens, shared by the tests of the data path."""

from __future__ import annotations

from pathlib import Path

import pytest

from pixelprune.flops import CostModel
from pixelprune.settings import PruneSettings, ResizeSettings
from training.data.chat import ChatEncoder
from training.data.prepare import Preparer
from training.toy_model import build_tokenizer, toy_config

from .samples import chat_row, draw_screen, write_jsonl


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="session")
def model_folder(tokenizer, tmp_path_factory) -> Path:
    """Tokenizer and config; data preparation needs no weights."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer.save_pretrained(folder)
    toy_config(tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def cost(tokenizer) -> CostModel:
    return CostModel.from_config(toy_config(tokenizer))


@pytest.fixture(scope="session")
def image_token_id(tokenizer) -> int:
    return tokenizer.convert_tokens_to_ids("<|image_pad|>")


@pytest.fixture
def preparer(tokenizer, image_token_id) -> Preparer:
    return Preparer(ChatEncoder(tokenizer), PruneSettings(), ResizeSettings(min_pixels=32 * 32), image_token_id)


@pytest.fixture
def screens(tmp_path):
    """A folder with 24 screens of two sizes and a train.jsonl over them; every third record is text only."""
    rows = []
    for i in range(24):
        if i % 3 == 2:
            rows.append(chat_row(None, f"Question {i}?", f"Answer {'yes ' * (i % 5 + 1)}"))
            continue
        name = f"screen_{i}.png"
        draw_screen(i, *((192, 128) if i % 2 else (320, 256))).save(tmp_path / name)
        rows.append(chat_row(name, f"Find {i}", f"({i}, {i})"))
    write_jsonl(tmp_path / "train.jsonl", rows)
    return tmp_path
