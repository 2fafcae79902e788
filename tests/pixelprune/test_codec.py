"""Propositions 1 and 2 as properties of `decode(encode(image))`, and the file format's refusals."""

from __future__ import annotations

import dataclasses
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pixelprune.codec import Compressed, decode, decode_sources, encode
from pixelprune.selection import select
from tests.pixelprune.selection_reference import distance, gradient, mosaic, page

PREDICTING = ("pred2d", "raster", "serpentine")
SAMPLES = sorted((Path(__file__).parents[2] / "data_tools" / "samples" / "images").glob("*.png"))


def blocks_of(image: np.ndarray, side: int) -> np.ndarray:
    rows, cols = image.shape[0] // side, image.shape[1] // side
    return np.array(
        [image[r * side : (r + 1) * side, c * side : (c + 1) * side] for r in range(rows) for c in range(cols)]
    )


def assert_recovers(image: np.ndarray, strategy: str, metric: str, threshold: float, block: int) -> None:
    compressed = encode(image, strategy=strategy, metric=metric, threshold=threshold, block=block)
    restored = decode(compressed)
    assert restored.shape == image.shape
    assert restored.dtype == np.uint8
    if threshold == 0:
        np.testing.assert_array_equal(restored, image)
    else:
        for original, standing in zip(blocks_of(image, block), blocks_of(restored, block), strict=True):
            assert distance(original, standing, metric) <= threshold
    # The decoder finds for every block the very source the encoder meant.
    selection = select(image, strategy=strategy, metric=metric, threshold=threshold, block=block)
    np.testing.assert_array_equal(np.flatnonzero(compressed.keep)[decode_sources(compressed)], selection.source)


images = st.one_of(
    st.builds(
        lambda seed, rows, cols, block, tiles, step, noise: (
            mosaic(np.random.default_rng(seed), rows, cols, block, tiles, step, noise),
            block,
        ),
        st.integers(0, 2**32 - 1),
        st.integers(1, 7),
        st.integers(1, 7),
        st.sampled_from([1, 2, 8, 32]),
        st.integers(1, 5),
        st.integers(0, 12),
        st.integers(0, 5),
    ),
    st.builds(
        lambda rows, cols, down, across: (gradient(rows, cols, 32, down, across), 32),
        st.integers(1, 6),
        st.integers(1, 6),
        st.floats(0, 20),
        st.floats(0, 20),
    ),
)


@settings(max_examples=100, deadline=None)
@given(
    picture=images,
    strategy=st.sampled_from([*PREDICTING, "none"]),
    metric=st.sampled_from(["max", "mae"]),
    threshold=st.one_of(st.just(0.0), st.floats(0, 0.15), st.sampled_from([0.005, 0.02, 0.05, 0.1, 1.0])),
)
def test_decoding_recovers_the_image(picture, strategy: str, metric: str, threshold: float) -> None:
    image, block = picture
    assert_recovers(image, strategy, metric, threshold, block)


@pytest.mark.parametrize("strategy", PREDICTING)
@pytest.mark.parametrize(("metric", "threshold"), [("max", 0.0), ("max", 0.02), ("mae", 0.02), ("mae", 0.1)])
def test_decoding_recovers_pages_and_noise(strategy: str, metric: str, threshold: float) -> None:
    noise = np.random.default_rng(1).integers(0, 256, size=(128, 96, 3), dtype=np.uint8)
    for image in (page(), page(seed=5)[::-1], noise):
        assert_recovers(image, strategy, metric, threshold, 32)


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.stem)
def test_decoding_recovers_real_screenshots(path: Path) -> None:
    image = np.asarray(Image.open(path).convert("RGB"))
    image = image[: image.shape[0] // 32 * 32, : image.shape[1] // 32 * 32]
    for strategy in PREDICTING:
        assert_recovers(image, strategy, "max", 0.0, 32)
        assert_recovers(image, strategy, "max", 0.02, 32)
        assert_recovers(image, strategy, "mae", 0.02, 32)


def test_gradual_change_does_not_drift_beyond_the_threshold() -> None:
    # Each block differs from its neighbour by less than the threshold, the ends by far more than it.
    image = gradient(1, 60, 32, 0.0, 3.0)
    compressed = encode(image, threshold=0.02)
    assert 1 < compressed.keep.sum() < 60
    assert np.abs(decode(compressed).astype(int) - image).max() <= 5


@pytest.mark.parametrize("strategy", [*PREDICTING, "none"])
def test_files_hold_everything(tmp_path: Path, strategy: str) -> None:
    image = page()
    path = tmp_path / "page.compressed"
    encode(image, strategy=strategy, metric="mae", threshold=0.0).save(path)
    loaded = Compressed.load(path)
    assert (loaded.strategy, loaded.metric, loaded.threshold, loaded.block) == (strategy, "mae", 0.0, 32)
    np.testing.assert_array_equal(decode(loaded), image)
    assert list(tmp_path.iterdir()) == [path]


def replaced(**changes) -> Compressed:
    return dataclasses.replace(encode(page()), **changes)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: replaced(blocks=encode(page()).blocks[:-1]), "mask keeps .* blocks, but"),
        (lambda: replaced(blocks=encode(page()).blocks.astype(np.int16)), "expected uint8 .*got int16"),
        (lambda: replaced(blocks=encode(page()).blocks[:, :16]), "expected uint8"),
        (lambda: replaced(blocks=np.zeros((1, 0, 0, 3), np.uint8), keep=np.ones((1, 1), bool)), "side of at least one"),
        (lambda: replaced(keep=np.ones(4, bool)), r"bool array \(rows, cols\)"),
        (lambda: replaced(keep=np.ones((0, 3), bool)), "non-empty"),
        (lambda: replaced(keep=np.roll(encode(page()).keep, 1, axis=1)), "first block is always kept"),
        (lambda: replaced(strategy="none"), "'none' keeps all blocks"),
        (lambda: replaced(strategy="random"), "'random' predicts nothing"),
        (lambda: replaced(strategy="zip"), "expected one of none"),
        (lambda: replaced(metric="l2"), "expected one of max, mae"),
        (lambda: replaced(threshold=2.0), "expected 0..1"),
        (lambda: encode(page(), strategy="conncomp"), "'conncomp' predicts nothing"),
    ],
)
def test_inconsistent_content_is_refused(make, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_inconsistent_files_are_refused(tmp_path: Path) -> None:
    good = encode(page())
    path = tmp_path / "image.npz"

    def write(**changes) -> None:
        fields = {
            "format": np.array("pixelprune-compressed-1"),
            "blocks": good.blocks,
            "keep": good.keep,
            "strategy": np.array("pred2d"),
            "metric": np.array("max"),
            "threshold": np.array(0.0),
        }
        fields.update(changes)
        np.savez(path, **{name: value for name, value in fields.items() if value is not None})

    write()
    np.testing.assert_array_equal(decode(Compressed.load(path)), page())
    for changes in (
        {"blocks": good.blocks[1:]},
        {"keep": None},
        {"extra": np.zeros(2)},
        {"format": np.array("pixelprune-compressed-0")},
        {"threshold": np.array([0.0, 1.0])},
        {"threshold": np.array(np.nan)},
        {"keep": np.array([[None]], dtype=object)},
    ):
        write(**changes)
        with pytest.raises(ValueError, match=r"image\.npz"):
            Compressed.load(path)
    for content in (b"", b"text", good.blocks.tobytes()[:200]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"image\.npz: not a compressed image"):
            Compressed.load(path)
    write()
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(ValueError, match=r"image\.npz"):
        Compressed.load(path)
    with pytest.raises(OSError, match="missing"):
        Compressed.load(tmp_path / "missing.npz")


def test_no_flipped_byte_gives_another_image_or_another_error(tmp_path: Path) -> None:
    path = tmp_path / "image.npz"
    image = mosaic(np.random.default_rng(0), 3, 4, 2, 3, 3, 0)
    encode(image, block=2).save(path)
    data = path.read_bytes()
    num_loaded = 0
    for i in range(len(data)):
        for flip in (0xFF, 1 << i % 8):
            path.write_bytes(data[:i] + bytes([data[i] ^ flip]) + data[i + 1 :])
            try:
                found = Compressed.load(path)
            except ValueError:
                continue
            np.testing.assert_array_equal(decode(found), image)
            num_loaded += 1
    assert 0 < num_loaded < len(data)  # dates and attributes of a member mean nothing


def test_small_files_of_giant_content_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "image.npz"
    good = encode(page())
    rules = {"strategy": "pred2d", "metric": "max", "threshold": 0.0, "format": "pixelprune-compressed-1"}
    keep = np.zeros((2000, 2000), bool)
    keep[0, 0] = True
    np.savez_compressed(path, blocks=good.blocks[:1], keep=keep, **rules)  # 12 GB once decoded
    assert path.stat().st_size < 20_000
    with pytest.raises(ValueError, match=r"image\.npz: 4000000 blocks of side 32 exceed max_pixels=100000000"):
        Compressed.load(path)
    np.savez_compressed(path, blocks=good.blocks, keep=good.keep, more=np.zeros(2**20, np.uint8), **rules)
    with pytest.raises(ValueError, match="bytes of content, more than an image of max_pixels=60000 has"):
        Compressed.load(path, max_pixels=60_000)

    def npy(shape: str) -> bytes:
        header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
        return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()

    with zipfile.ZipFile(path, "w") as archive:  # a header that promises 3 petabytes, and nothing behind it
        archive.writestr("blocks.npy", npy("(1000000000000, 32, 32, 3)"))
    with pytest.raises(ValueError, match="not a compressed image"):
        Compressed.load(path)
    good.save(path)
    assert Compressed.load(path, max_pixels=good.keep.size * 1024).keep.shape == good.keep.shape


def test_a_mask_with_holes_cannot_be_replayed_as_full() -> None:
    from pixelprune.selection.registry import get_strategy

    replay = get_strategy("none").replay
    good = encode(page())
    with pytest.raises(ValueError, match="keeps every block"):
        replay(good.blocks, good.keep, good.settings, 32)
