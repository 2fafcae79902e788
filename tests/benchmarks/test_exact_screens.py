"""The benchmark's synthetic screenshots keep exactly the share of blocks that they promise."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from benchmarks.exact_screens import draw_layout, exact_layout, grid_of, write_exact_screens
from pixelprune.selection import select
from tests.pixelprune.selection_reference import reference_select


@pytest.mark.parametrize(
    ("rows", "cols", "num_kept"), [(25, 40, 400), (9, 7, 1), (9, 7, 2), (9, 7, 63), (46, 74, 1362)]
)
def test_the_drawn_page_keeps_exactly_the_number_asked_for(rows, cols, num_kept):
    image = np.asarray(draw_layout(exact_layout(rows, cols, num_kept, seed=3), seed=3))
    assert image.shape == (32 * rows, 32 * cols, 3)
    assert select(image).num_kept == num_kept


def test_the_number_holds_by_the_reference_too():
    image = np.asarray(draw_layout(exact_layout(8, 12, 39, seed=0), seed=0))
    keep, _ = reference_select(image, "pred2d", "max", 0.0, 32)
    assert keep.sum() == 39


def test_written_records_show_screens_of_the_size_and_ratio_asked_for(tmp_path):
    path = write_exact_screens(tmp_path, 3, megapixels=0.25, retain=0.4)
    rows, cols = grid_of(0.25)
    assert abs(rows * cols * 32 * 32 - 250_000) < 32 * 32 * cols
    names = [json.loads(line)["messages"][0]["content"][0]["image"] for line in path.read_text().splitlines()]
    images = [np.asarray(Image.open(tmp_path / name)) for name in names]
    assert [select(image).num_kept for image in images] == [round(0.4 * rows * cols)] * 3
    assert len({image.tobytes() for image in images}) == 3


def test_an_impossible_number_is_refused():
    with pytest.raises(ValueError, match="expected 1 to 6 for 2 x 3 blocks, got 7"):
        exact_layout(2, 3, 7, seed=0)
