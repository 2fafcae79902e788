"""Records that many tests train on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from data_tools.render.browser import Browser, Tab, find_chromium
from tests.training.debug_run import NUM_EVAL, NUM_TRAIN, write_records


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_records(folder, "train", NUM_TRAIN)
    write_records(folder, "eval", NUM_EVAL)
    return folder


@pytest.fixture(scope="module")
def tab() -> Iterator[Tab]:
    """Of a Chromium that reaches files and no network."""
    need_chromium()
    with Browser() as browser:
        yield browser.new_tab()


def need_chromium() -> None:
    pytest.importorskip("websocket", reason="websocket-client is not installed (pip install pixelprune[screens])")
    if find_chromium() is None:
        pytest.skip("no Chromium on PATH (apt-get install chromium)")
