"""What the kernels promise beyond right answers: one compilation, a disk cache, no GIL."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import pixelprune.selection.kernels
from pixelprune.codec import decode, encode
from pixelprune.selection import kernels, select
from tests.pixelprune.selection_reference import distance, mosaic, page

ENTRY_POINTS = (
    kernels.pred2d_exact,
    kernels.pred2d_near,
    kernels.scan,
    kernels.replay_pred2d,
    kernels.equal_neighbours,
    kernels.label_components,
)


def test_every_form_of_input_uses_one_compiled_kernel() -> None:
    kernels.compile_all()
    read_only = page()
    read_only.flags.writeable = False
    images = [page(), read_only, page()[:, ::-1], np.asfortranarray(page()), page()[32:, 32:]]
    arguments = itertools.product(
        images, ("pred2d", "raster", "serpentine", "conncomp"), ("max", "mae"), (0, 0.0, 0.1, 1)
    )
    for image, strategy, metric, threshold in arguments:
        select(image, strategy=strategy, metric=metric, threshold=threshold)
        select(image, strategy=strategy, metric=metric, threshold=np.float32(threshold), block=16)
        if strategy != "conncomp":
            decode(encode(image, strategy=strategy, metric=metric, threshold=threshold))
    for kernel in ENTRY_POINTS:
        assert len(kernel.signatures) == 1, (kernel.__name__, kernel.signatures)


def test_compiled_code_is_cached_on_disk(tmp_path: Path) -> None:
    code = (
        "import json, numpy as np; from pixelprune import select; from pixelprune.selection import kernels;"
        "select(np.zeros((64, 64, 3), np.uint8)); stats = kernels.pred2d_exact.stats;"
        "print(json.dumps([sum(stats.cache_hits.values()), sum(stats.cache_misses.values())]))"
    )
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    hits_and_misses = [
        json.loads(
            subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True).stdout
        )
        for _ in range(2)
    ]
    assert hits_and_misses == [[0, 1], [1, 0]]


def test_selection_releases_the_gil() -> None:
    # A counter in this thread advances while the other is inside one long kernel call; holding the GIL would stop it.
    image = np.random.default_rng(0).integers(0, 2, size=(4096, 4096, 3), dtype=np.uint8)
    flat = image.reshape(-1).view()
    flat.flags.writeable = False
    keep, source = np.empty((128, 128), bool), np.empty((128, 128), np.int32)
    kernels.pred2d_near(flat, 32, kernels.MAE, 10**9, keep, source)
    inside = threading.Event()

    def work() -> None:
        inside.set()
        for _ in range(20):
            kernels.pred2d_near(flat, 32, kernels.MAX, 255, keep, source)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)  # without a release inside the kernel, no switch happens until the thread ends
    try:
        thread = threading.Thread(target=work)
        thread.start()
        inside.wait()
        ticks = 0
        while thread.is_alive():
            ticks += 1
            time.sleep(0)
        assert ticks > 1
    finally:
        sys.setswitchinterval(interval)
        thread.join()


@pytest.mark.parametrize("block", [1, 5, 32, 33, 64, 96])
def test_omission_test_is_the_distance_at_any_block_size(block: int) -> None:
    rng = np.random.default_rng(block)
    for _ in range(40):
        image = mosaic(rng, 1, 2, block, num_tiles=2, step=int(rng.integers(0, 6)), noise=int(rng.integers(0, 8)))
        if rng.integers(2):
            image = rng.integers(0, 256, size=image.shape, dtype=np.uint8)
        left, right = image[:, :block], image[:, block:]
        flat, stride = image.reshape(-1).view(), 6 * block
        flat.flags.writeable = False
        total = int(np.abs(left.astype(int) - right).sum())
        largest = round(distance(left, right, "max") * 255)
        for metric, exact in ((kernels.MAX, largest), (kernels.MAE, total)):
            for limit in {0, max(0, exact - 1), exact, min(exact + 1, 255 if metric == kernels.MAX else exact + 1)}:
                assert kernels.matches(flat, stride, 0, 3 * block, block, metric, limit) == (exact <= limit)
        assert kernels.matches(flat, stride, 0, 3 * block, block, kernels.EXACT, 0) == (total == 0)


def test_components_are_labelled_by_their_first_block() -> None:
    # A spiral: one component that meets itself only at its inner end, around another.
    picture = np.array([[0, 0, 0, 0, 0], [0, 1, 1, 1, 0], [0, 1, 0, 1, 0], [0, 1, 1, 1, 0], [0, 0, 0, 0, 0]])
    cases = [picture, np.rot90(picture[:4]), np.array([[1, 0, 1], [1, 0, 1], [1, 1, 1]]), np.zeros((1, 4), int)]
    for grid in cases:
        left, above = np.zeros(grid.shape, bool), np.zeros(grid.shape, bool)
        left[:, 1:] = grid[:, 1:] == grid[:, :-1]
        above[1:] = grid[1:] == grid[:-1]
        label = np.empty(grid.shape, np.int64)
        kernels.label_components(left, above, label)
        expected = flood(grid)
        np.testing.assert_array_equal(label, expected)


def flood(grid: np.ndarray) -> np.ndarray:
    """Smallest flat index each cell reaches over equal 4-neighbours, by relaxing until nothing changes."""
    label = np.arange(grid.size).reshape(grid.shape)
    while True:
        before = label.copy()
        for axis in (0, 1):
            for one, other in ((slice(1, None), slice(None, -1)), (slice(None, -1), slice(1, None))):
                here = (one, slice(None)) if axis == 0 else (slice(None), one)
                there = (other, slice(None)) if axis == 0 else (slice(None), other)
                same = grid[here] == grid[there]
                label[here] = np.where(same, np.minimum(label[here], label[there]), label[here])
        if (label == before).all():
            return label


def test_what_compiled_code_calls_is_in_one_file() -> None:
    # numba's cache would not notice a change elsewhere and go on running the old code.
    source = Path(pixelprune.selection.kernels.__file__).read_text()
    assert "from pixelprune" not in source
    assert "import pixelprune" not in source
