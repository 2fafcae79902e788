"""What the benchmark of the index measures: records whose screenshots are files of their own, and can all be used."""

from __future__ import annotations

import numpy as np

from benchmarks.index import NUM_ORIGINALS, write_records, write_screenshots
from pixelprune.images.image import decode_pixels
from pixelprune.settings import ResizeSettings
from training.data.settings import SourceSettings
from training.data.sources import open_source


def test_every_screenshot_is_a_readable_file_of_its_own(tmp_path):
    num = NUM_ORIGINALS + 3
    write_screenshots(tmp_path, num)
    files = [(tmp_path / f"{number}.png").read_bytes() for number in range(num)]
    assert len(set(files)) == num
    first, copy = (decode_pixels(files[number], ResizeSettings()) for number in (0, NUM_ORIGINALS))
    assert np.array_equal(first, copy)
    write_records(tmp_path / "records.jsonl", 40, num)
    rows = open_source(SourceSettings(str(tmp_path / "records.jsonl"))).rows
    shown = [rows[row]["messages"][0]["content"][0]["image"] for row in range(len(rows))]
    assert (len(shown), len(set(shown))) == (40, num)
