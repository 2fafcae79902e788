"""`fit_size` against the Hugging Face processor's own function."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from pixelprune.images.sizing import fit_size


@settings(max_examples=800, deadline=None)
@given(
    height=st.integers(1, 9000),
    width=st.integers(1, 9000),
    factor=st.sampled_from([28, 32]),
    min_pixels=st.sampled_from([1, 32 * 32, 256 * 256, 1_000_003]),
    more=st.sampled_from([0, 1, 100_000, 16_777_216]),
)
@example(height=48, width=80, factor=32, min_pixels=1, more=16_777_216)  # .5 rounds to the even multiple
@example(height=2, width=400, factor=32, min_pixels=65536, more=0)
@example(height=4096, width=4096, factor=32, min_pixels=65536, more=16_777_216 - 65536)
@example(height=9000, width=45, factor=32, min_pixels=1, more=100_000)
def test_sizes_are_the_processors(height: int, width: int, factor: int, min_pixels: int, more: int) -> None:
    limits = {"min_pixels": min_pixels, "max_pixels": min_pixels + more, "factor": factor}
    try:
        expected = smart_resize(height, width, **limits)
    except ValueError:
        with pytest.raises(ValueError, match="aspect ratio of at most 200"):
            fit_size(height, width, **limits)
        return
    assert fit_size(height, width, **limits) == tuple(expected)


def test_aspect_limit_is_inclusive_and_adjustable() -> None:
    assert fit_size(10, 2000) == smart_resize(10, 2000, 32, 256 * 256, 4096 * 4096)
    with pytest.raises(ValueError, match="at most 200, got 2001x10"):
        fit_size(10, 2001)
    with pytest.raises(ValueError, match="at most 3"):
        fit_size(100, 301, max_aspect_ratio=3)


@pytest.mark.parametrize(("height", "width"), [(0, 5), (5, 0), (-1, 5)])
def test_empty_pictures_are_refused(height: int, width: int) -> None:
    with pytest.raises(ValueError, match="at least 1x1"):
        fit_size(height, width)


@pytest.mark.parametrize(("min_pixels", "max_pixels"), [(0, 100), (101, 100)])
def test_impossible_limits_are_refused(min_pixels: int, max_pixels: int) -> None:
    with pytest.raises(ValueError, match="1 <= min_pixels <= max_pixels"):
        fit_size(64, 64, min_pixels=min_pixels, max_pixels=max_pixels)
