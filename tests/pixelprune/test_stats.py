"""Redundancy statistics: what is counted, what is summed, what is listed as unreadable."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pixelprune.selection import Selection, select
from pixelprune.selection.overlay import draw_overlay, side_by_side
from pixelprune.selection.stats import (
    DatasetStats,
    ImageStats,
    count_contents,
    find_images,
    measure_files,
    measure_image,
)
from pixelprune.settings import PruneSettings, ResizeSettings
from tests.pixelprune.selection_reference import mosaic, page

RULES = {"pred2d": PruneSettings(), "none": PruneSettings(strategy="none")}
SMALL = ResizeSettings(min_pixels=32 * 32)


def test_contents_are_counted_as_distinct_and_as_unique() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        image = mosaic(rng, *rng.integers(1, 7, size=2), 32, num_tiles=4, step=3, noise=0)
        cells = image[::32, ::32].reshape(-1, 3)
        _, times = np.unique(cells, axis=0, return_counts=True)
        assert count_contents(image) == (len(times), (times == 1).sum())
    almost = np.zeros((32, 64, 3), np.uint8)
    almost[31, 63, 2] = 1
    assert count_contents(almost) == (2, 2)


def test_an_image_is_measured_as_the_model_sees_it(tmp_path: Path) -> None:
    path = tmp_path / "page.png"
    Image.fromarray(page(200, 330)).save(path)
    got = measure_image(path, RULES, SMALL)
    seen = np.asarray(Image.open(path).resize((320, 192), Image.Resampling.BICUBIC))
    assert (got.original_size, got.size, got.num_blocks) == ((200, 330), (192, 320), 60)
    assert got.kept == {"pred2d": select(seen).num_kept, "none": 60}
    assert (got.num_distinct, got.num_unique) == count_contents(seen)
    assert got.duplicate_ratio == 1 - got.num_unique / 60


def make(kept: int, blocks: int, unique: int, size: tuple[int, int]) -> ImageStats:
    return ImageStats(
        f"{kept}.png", size, (2 * size[0], 2 * size[1]), blocks, unique + 3, unique, {"pred2d": kept, "none": blocks}
    )


def test_data_set_ratios_are_ratios_of_sums() -> None:
    result = DatasetStats([make(90, 100, 80, (10, 20)), make(100, 900, 50, (30, 20))], [("x.png", "damaged")])
    assert result.retain_ratio("pred2d") == 190 / 1000  # the mean of ratios would be 0.506
    assert result.duplicate_ratio == pytest.approx(1 - 130 / 1000)
    assert result.mean_size() == (40.0, 40.0)
    assert result.mean_size(original=True) == (20.0, 20.0)
    assert [image.path for image in result.by_retain_ratio("pred2d")] == ["100.png", "90.png"]
    summary = result.as_dict()
    assert summary["retain_ratio"] == {"pred2d": 0.19, "none": 1.0}
    assert (summary["num_distinct_blocks"], summary["num_unique_blocks"]) == (136, 130)
    assert summary["images"][0]["retain_ratio"]["pred2d"] == 0.9
    assert summary["unreadable"] == [{"path": "x.png", "reason": "damaged"}]
    assert DatasetStats().as_dict() == {"num_images": 0, "images": [], "unreadable": []}


def test_folders_are_walked_and_bad_files_listed(tmp_path: Path) -> None:
    (tmp_path / "b" / "deep").mkdir(parents=True)
    picture = Image.fromarray(page())
    picture.save(tmp_path / "b" / "deep" / "one.PNG", format="PNG")
    picture.save(tmp_path / "b" / "two.jpg")
    picture.save(tmp_path / "a.webp", lossless=True)
    picture.save(tmp_path / "named.bmp")
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "b" / "broken.jpeg").write_bytes((tmp_path / "b" / "two.jpg").read_bytes()[:300])
    paths, unreadable = find_images([tmp_path, tmp_path / "named.bmp", tmp_path / "gone.png"])
    names = [path.relative_to(tmp_path).as_posix() for path in paths]
    assert names == ["a.webp", "b/broken.jpeg", "b/two.jpg", "b/deep/one.PNG", "named.bmp", "gone.png"]
    assert unreadable == []
    outcomes = list(measure_files(paths, RULES, SMALL, num_threads=2))
    assert [isinstance(outcome, ImageStats) for outcome in outcomes] == [True, False, True, True, True, False]
    assert "broken.jpeg" in outcomes[1][1]
    assert "no such file" in outcomes[5][1]
    exact = [outcomes[index].kept["pred2d"] for index in (0, 3, 4)]
    assert exact == [select(page()).num_kept] * 3


def test_unlistable_folders_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "locked").mkdir()
    import os

    real = os.scandir

    def scandir(path):
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert find_images([tmp_path]) == ([], [(str(tmp_path / "locked"), "Permission denied")])


def test_overlay_changes_omitted_blocks_only() -> None:
    image = page()
    selection = select(image)
    drawn = draw_overlay(image, selection)
    wide_keep = np.repeat(np.repeat(selection.keep, 32, axis=0), 32, axis=1)
    assert drawn.dtype == np.uint8
    np.testing.assert_array_equal(drawn[wide_keep], image[wide_keep])
    assert (drawn[~wide_keep] != image[~wide_keep]).any(axis=-1).all()
    assert (np.ptp(drawn[~wide_keep].astype(int), axis=0) < 100).all()
    with pytest.raises(ValueError, match="6 x 10 blocks does not fit an image of 192 x 352"):
        draw_overlay(page(192, 352), selection)


def test_panels_are_laid_out_unscaled_and_unmixed() -> None:
    panels = [(f"panel {shade}", np.full((64, 96, 3), shade, np.uint8)) for shade in (10, 90, 170)]
    sheet = np.asarray(side_by_side(panels))
    for _, panel in panels:
        where = np.argwhere((sheet == panel[0, 0]).all(axis=-1))
        top, left = where.min(axis=0)
        np.testing.assert_array_equal(sheet[top : top + 64, left : left + 96], panel)
    assert side_by_side(panels, max_panel_width=48).width < sheet.shape[1]
    assert side_by_side(panels, num_cols=1).height > side_by_side(panels, num_cols=len(panels)).height
    with pytest.raises(ValueError, match="at least one panel"):
        side_by_side([])
    with pytest.raises(ValueError, match="panels of one size"):
        side_by_side([panels[0], ("other", np.zeros((32, 32, 3), np.uint8))])


def test_overlay_of_a_full_selection_is_the_image() -> None:
    full = Selection(np.ones((6, 10), bool), np.arange(60, dtype=np.int32).reshape(6, 10))
    np.testing.assert_array_equal(draw_overlay(page(), full), page())
