"""Shared fixtures: one thread per process, a toy model folder, screenshot-like pictures."""

from __future__ import annotations

import importlib.util
import os
import signal
from pathlib import Path

import numpy as np
import pytest

# Ranks of tests are CPU ranks over gloo on every machine, two of them on one GPU too. Tests of CUDA kernels use torch.
os.environ.setdefault("DS_ACCELERATOR", "cpu")


def pytest_make_parametrize_id(config, val, argname):
    """No case is named after its bytes: a gzip holds the time it was made at, and two workers collected two names."""
    return f"{argname}-{len(val)}-bytes" if isinstance(val, bytes) else None


def pytest_collection_modifyitems(items):
    """`-m cuda` selects all that needs a GPU: the marker alone says so, and skips where there is none.

    Files that start ranks take minutes and come first, whole: last, one worker would wait for the other's.
    """
    import torch

    long = {item.path for item in items if item.get_closest_marker("ranks")}
    items.sort(key=lambda item: item.path not in long)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _no_ignored_signals():
    """`nohup` and shells' background jobs ignore signals, and so would every program that is started here."""
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


@pytest.fixture(scope="session", autouse=True)
def _no_stale_build_lock():
    """A run of the tests that was killed must not make this one wait. The serving environment has no DeepSpeed."""
    if importlib.util.find_spec("deepspeed") is None:
        return
    from training.distributed.build_lock import clear_stale_lock

    clear_stale_lock()


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory) -> Path:
    from training.composition.toy import build_toy_model

    return build_toy_model(tmp_path_factory.mktemp("toy") / "model")


@pytest.fixture(scope="session")
def toy_model(toy_folder):
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(toy_folder).eval()


@pytest.fixture(scope="session")
def toy_tokenizer(toy_folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(toy_folder)


@pytest.fixture(scope="session")
def geometry(toy_model):
    from pixelprune.pack import VisionGeometry

    return VisionGeometry.from_config(toy_model.config)


@pytest.fixture(scope="session")
def tokenizer():
    from training.composition.toy import build_tokenizer

    return build_tokenizer()


@pytest.fixture(scope="session")
def model_folder(tokenizer, tmp_path_factory) -> Path:
    """Tokenizer and config; data preparation needs no weights."""
    from training.composition.toy import toy_config

    folder = tmp_path_factory.mktemp("model")
    tokenizer.save_pretrained(folder)
    toy_config(tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def cost(tokenizer):
    from pixelprune.flops import CostModel
    from training.composition.toy import toy_config

    return CostModel.from_config(toy_config(tokenizer))


@pytest.fixture(scope="session")
def image_token_id(tokenizer) -> int:
    return tokenizer.convert_tokens_to_ids("<|image_pad|>")


@pytest.fixture
def preparer(tokenizer, image_token_id):
    from pixelprune.records.chat import ChatEncoder
    from pixelprune.records.prepare import Preparer
    from pixelprune.settings import PruneSettings, ResizeSettings

    return Preparer(ChatEncoder(tokenizer), PruneSettings(), ResizeSettings(min_pixels=32 * 32), image_token_id)


@pytest.fixture
def screens(tmp_path):
    """A folder with 24 screens of two sizes and a train.jsonl over them; every third record is text only."""
    from tests.samples import chat_row, draw_screen, write_jsonl

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


def screen(rows: int, cols: int, seed: int = 0) -> np.ndarray:
    """A picture like a screenshot: flat panels with a few noisy blocks, uint8 (32 * rows, 32 * cols, 3)."""
    rng = np.random.default_rng(seed)
    image = np.full((32 * rows, 32 * cols, 3), 240, dtype=np.uint8)
    image[:, : 32 * (cols // 3)] = (30, 60, 90)
    for _ in range(max(1, rows * cols // 3)):
        r, c = rng.integers(rows), rng.integers(cols)
        image[32 * r : 32 * r + 32, 32 * c : 32 * c + 32] = rng.integers(0, 256, (32, 32, 3))
    return image
