"""Our bicubic resize against Pillow's: every bit, for every kind of size change."""

import logging

import numpy as np
import pytest
from PIL import Image

from pixelprune.images import resample
from pixelprune.images.resample import resize_bicubic

SIZES = {
    "one dimension, vertical": ((1080, 1920), (1088, 1920)),
    "one dimension, horizontal": ((96, 1366), (96, 1376)),
    "both, one up and one down": ((211, 98), (224, 96)),
    "both, the other way": ((98, 211), (96, 224)),
    "a phone's screen": ((1688, 780), (1696, 768)),
    "much larger": ((10, 14), (320, 448)),
    "much smaller": ((700, 900), (32, 64)),
    "flat": ((40, 3000), (32, 2976)),
    "tiny": ((1, 1), (32, 32)),
    "one row": ((1, 50), (32, 64)),
    "to one pixel": ((33, 47), (1, 1)),
    "the same": ((64, 96), (64, 96)),
}


def images(height: int, width: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(height * width)
    noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    # Black and white noise overshoots most: rounding below 0 and above 255.
    return {"noise": noise, "extremes": np.where(noise > 127, 255, 0).astype(np.uint8)}


def pillow(image: np.ndarray, height: int, width: int) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def test_this_pillow_is_the_one_we_know():
    assert resample._equals_pillow()


@pytest.mark.parametrize("name", SIZES)
def test_equal_in_every_bit(name):
    (height, width), (new_height, new_width) = SIZES[name]
    for image in images(height, width).values():
        np.testing.assert_array_equal(
            resize_bicubic(image, new_height, new_width), pillow(image, new_height, new_width)
        )


def test_equal_for_random_sizes():
    rng = np.random.default_rng(0)
    for _ in range(200):
        height, width, new_height, new_width = rng.integers(1, 200, 4).tolist()
        image = images(height, width)["extremes"]
        np.testing.assert_array_equal(
            resize_bicubic(image, new_height, new_width), pillow(image, new_height, new_width)
        )


def test_what_is_left_to_pillow(monkeypatch):
    """Only sizes whose order of passes depends on Pillow's version."""
    left = []
    monkeypatch.setattr(resample, "_pillow", lambda image, height, width: left.append((height, width)))
    image = images(100, 100)["noise"]
    sizes = [(h, w) for h in (90, 100, 110) for w in (90, 100, 110)]
    monkeypatch.setattr(resample, "_equals_pillow", lambda: True)
    for height, width in sizes:
        resize_bicubic(image, height, width)
    assert left == [(90, 90), (90, 110)]


def test_views_and_read_only_arrays():
    whole = images(120, 160)["noise"]
    view = whole[10:90:2, 100:20:-1]
    view.flags.writeable = False
    np.testing.assert_array_equal(resize_bicubic(view, 64, 96), pillow(np.ascontiguousarray(view), 64, 96))


def test_another_pillow_is_noticed_and_used(monkeypatch, caplog):
    def other_pillow(image, height, width):
        return pillow(image, height, width) ^ 1

    monkeypatch.setattr(resample, "_pillow", other_pillow)
    resample._equals_pillow.cache_clear()
    image = images(50, 60)["noise"]
    with caplog.at_level(logging.WARNING):
        found = resize_bicubic(image, 64, 64)
    resample._equals_pillow.cache_clear()
    np.testing.assert_array_equal(found, other_pillow(image, 64, 64))
    assert "resizing with Pillow" in caplog.text
