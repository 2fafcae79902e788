"""PNG files hold exactly the pixels that were given."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_tools.render.png import encode_png


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 2, 3, 4, 5, 16, 17, 256, 257, 4000]), st.integers(0, 99)
)
def test_every_pixel_comes_back(height: int, width: int, num_colours: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    colours = rng.integers(0, 256, (num_colours, 3), dtype=np.uint8)
    image = colours[rng.integers(0, num_colours, (height, width))]
    for level in (1, 9):
        with Image.open(io.BytesIO(encode_png(image, level=level))) as read:
            read.load()  # checks the checksums
            np.testing.assert_array_equal(np.asarray(read.convert("RGB")), image)


def test_a_photograph_is_filtered_and_a_screen_becomes_a_palette() -> None:
    ramp = np.add.outer(np.arange(200), np.arange(300)).astype(np.uint8)
    photograph = np.stack([ramp, ramp * 3, 255 - ramp], axis=2)
    with Image.open(io.BytesIO(encode_png(photograph))) as read:
        np.testing.assert_array_equal(np.asarray(read.convert("RGB")), photograph)
    screen = np.zeros((200, 300, 3), np.uint8)
    screen[50:60] = (255, 0, 0)
    with Image.open(io.BytesIO(encode_png(screen))) as read:
        assert read.mode in ("P", "1", "L")
    assert len(encode_png(screen)) < 200


def test_other_arrays_are_refused() -> None:
    for image in (np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 3), np.float32)):
        with pytest.raises(ValueError, match="expected uint8"):
            encode_png(image)
