"""Records that many tests train on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.debug_run import NUM_EVAL, NUM_TRAIN, write_records


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_records(folder, "train", NUM_TRAIN)
    write_records(folder, "eval", NUM_EVAL)
    return folder
