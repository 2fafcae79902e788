"""`select` against the method's definition, and its refusals."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pixelprune.selection import Selection, select
from pixelprune.selection.registry import get_strategy, is_recoverable, register, strategy_names
from pixelprune.selection.strategies import integer_limit
from pixelprune.settings import PruneSettings
from tests.pixelprune.selection_reference import gradient, mosaic, page, reference_select

PREDICTING = ("pred2d", "raster", "serpentine")


def assert_agrees(image: np.ndarray, strategy: str, metric: str, threshold: float, block: int) -> None:
    got = select(image, strategy=strategy, metric=metric, threshold=threshold, block=block)
    keep, source = reference_select(image, strategy, metric, threshold, block)
    np.testing.assert_array_equal(got.keep, keep)
    np.testing.assert_array_equal(got.source, source)
    assert got.keep.dtype == np.bool_
    assert got.source.dtype == np.int32


@pytest.mark.parametrize("strategy", [*PREDICTING, "none"])
@pytest.mark.parametrize("metric", ["max", "mae"])
def test_thousands_of_random_grids_agree_with_the_definition(strategy: str, metric: str) -> None:
    rng = np.random.default_rng(7)
    for number in range(500):
        rows, cols = (1, 1) if number == 0 else rng.integers(1, 9, size=2)
        if number % 10 == 1:
            rows = 1
        if number % 10 == 2:
            cols = 1
        block = int(rng.choice([1, 2, 4]))
        step, noise = int(rng.integers(1, 12)), int(rng.choice([0, 0, 1, 4]))
        image = mosaic(rng, rows, cols, block, num_tiles=int(rng.integers(1, 5)), step=step, noise=noise)
        threshold = float(rng.choice([0.0, 1 / 255, 0.01, 0.02, 0.03, 0.05, 1.0]))
        assert_agrees(image, strategy, metric, threshold, block)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    grid=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    block=st.sampled_from([32, 64, 40]),
    num_tiles=st.integers(1, 4),
    step=st.integers(0, 9),
    noise=st.integers(0, 3),
    strategy=st.sampled_from(PREDICTING),
    metric=st.sampled_from(["max", "mae"]),
    threshold=st.sampled_from([0.0, 0.005, 0.02, 0.05]),
)
def test_vector_comparisons_agree_with_the_definition(
    seed, grid, block, num_tiles, step, noise, strategy, metric, threshold
) -> None:
    image = mosaic(np.random.default_rng(seed), *grid, block, num_tiles, step, noise)
    assert_agrees(image, strategy, metric, threshold, block)


@pytest.mark.parametrize("strategy", PREDICTING)
@pytest.mark.parametrize("metric", ["max", "mae"])
@pytest.mark.parametrize("threshold", [0.0, 0.005, 0.02, 0.05, 0.1])
def test_gradients_noise_and_pages_agree_with_the_definition(strategy: str, metric: str, threshold: float) -> None:
    noise = np.random.default_rng(3).integers(0, 256, size=(96, 128, 3), dtype=np.uint8)
    for image in (gradient(5, 7, 32, 2.5, 1.0), gradient(6, 4, 32, 0.0, 3.0), noise, page()):
        assert_agrees(image, strategy, metric, threshold, 32)


@pytest.mark.parametrize("strategy", PREDICTING)
def test_one_changed_byte_anywhere_in_a_block_is_seen(strategy: str) -> None:
    flat = np.full((64, 64, 3), 77, dtype=np.uint8)
    for offset in range(32 * 96):
        image = flat.copy()
        image[32 + offset // 96, offset % 96 // 3, offset % 3] = 78  # in the lower left block
        assert select(image, strategy=strategy).keep[1, 0], offset
        assert not select(image, strategy=strategy, threshold=1 / 255).keep[1, 0], offset
        assert select(image, strategy=strategy, threshold=1 / 256).keep[1, 0], offset
        assert not select(image, strategy=strategy, metric="mae", threshold=1 / (255 * 3072)).keep[1, 0], offset
        assert select(image, strategy=strategy, metric="mae", threshold=0.999 / (255 * 3072)).keep[1, 0], offset


def test_extreme_differences_do_not_wrap_around() -> None:
    image = np.zeros((32, 64, 3), dtype=np.uint8)
    image[:, 32:] = 255
    for metric in ("max", "mae"):
        assert select(image, metric=metric, threshold=254 / 255).num_kept == 2
        assert select(image, metric=metric, threshold=1.0).num_kept == 1


@pytest.mark.parametrize(("threshold", "limit"), [(0.2, 51), (0.1, 25), (0.02, 5), (0.005, 1), (1.0, 255), (1e-9, 0)])
def test_thresholds_are_inclusive_on_the_byte_scale(threshold: float, limit: int) -> None:
    assert integer_limit("max", threshold, 32)[1] == limit


@settings(max_examples=200, deadline=None)
@given(threshold=st.floats(1e-9, 1.0), metric=st.sampled_from(["max", "mae"]))
def test_integer_limit_is_the_last_distance_within(threshold: float, metric: str) -> None:
    limit = integer_limit(metric, threshold, 32)[1]
    scale = 255 if metric == "max" else 255 * 3072
    assert limit / scale <= threshold < (limit + 1) / scale


def test_input_forms_give_the_same_result() -> None:
    image = page()
    expected = select(image)
    read_only = image.copy()
    read_only.flags.writeable = False
    wide = np.zeros((image.shape[0], image.shape[1] + 5, 3), dtype=np.uint8)
    wide[:, :-5] = image
    buffer = np.zeros(image.size + 1, dtype=np.uint8)
    buffer[1:] = image.ravel()
    odd_address = buffer[1:].reshape(image.shape)
    for form in (read_only, wide[:, :-5], np.asfortranarray(image), odd_address):
        got = select(form)
        np.testing.assert_array_equal(got.source, expected.source)
        np.testing.assert_array_equal(got.keep, expected.keep)
    assert image.flags.writeable


def test_threads_select_independently() -> None:
    images = [page(seed=seed) for seed in range(4)]
    expected = [select(image, threshold=0.02) for image in images]
    results: list[list[Selection]] = [[] for _ in images]

    def work(slot: int) -> None:
        for _ in range(50):
            results[slot].append(select(images[slot], threshold=0.02))

    threads = [threading.Thread(target=work, args=(slot,)) for slot in range(len(images))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for want, got in zip(expected, results, strict=True):
        assert len(got) == 50
        for selection in got:
            np.testing.assert_array_equal(selection.source, want.source)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.zeros((32, 32), np.uint8), r"shape \(height, width, 3\).*got \(32, 32\)"),
        (np.zeros((32, 32, 4), np.uint8), r"got \(32, 32, 4\)"),
        (np.zeros((32, 32, 3), np.float32), "uint8.*got float32"),
        (np.zeros((0, 32, 3), np.uint8), "at least one pixel, got 0 x 32"),
        (np.zeros((33, 32, 3), np.uint8), "multiples of 32, got 33 x 32"),
        ([[1]], "numpy array, got list"),
    ],
)
def test_wrong_images_are_refused(image, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        select(image)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"strategy": "pred4d"}, "one of none, pred2d, pred3d, raster.*got 'pred4d'"),
        ({"metric": "rmse"}, "one of max, mae, got 'rmse'"),
        ({"threshold": -0.1}, "expected 0..1"),
        ({"threshold": 5}, "expected 0..1.*got 5"),
        ({"threshold": float("nan")}, "expected 0..1"),
        ({"block": 0}, "block: expected a positive"),
    ],
)
def test_wrong_settings_are_refused(arguments: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        select(np.zeros((32, 32, 3), np.uint8), **arguments)


def test_a_strategy_is_one_function_and_its_name_is_taken_once() -> None:
    assert [name for name in strategy_names() if name in (*PREDICTING, "none")] == ["none", *PREDICTING]
    with pytest.raises(ValueError, match="'pred2d' is registered twice"):
        register("pred2d")(get_strategy("none").run)


def test_recoverable_is_what_a_decoder_can_restore_exactly() -> None:
    assert all(is_recoverable(PruneSettings(strategy=name)) for name in (*PREDICTING, "none"))
    assert not is_recoverable(PruneSettings(threshold=0.01))
    assert not is_recoverable(PruneSettings(strategy="random"))


def test_importing_the_package_loads_no_heavy_library() -> None:
    code = "import sys, pixelprune; print([m for m in ('torch', 'transformers', 'numba') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_selection_counts() -> None:
    selection = Selection(np.array([[True, False], [False, True]]), np.array([[0, 0], [0, 3]], np.int32))
    assert (selection.num_kept, selection.num_blocks, selection.retain_ratio) == (2, 4, 0.5)
    assert dataclasses.is_dataclass(selection)
