"""Builds the index of DATA for MODEL in a process of its own, four rows a part, and logs every row that is measured."""

from __future__ import annotations

import sys

from pixelprune.records.prepare import PrepareSettings
from pixelprune.settings import PruneSettings, ResizeSettings
from tests.training.data import hostile_measures
from training.data import index_builder
from training.data.settings import SourceSettings

if __name__ == "__main__":
    data, model = sys.argv[1:]
    index_builder.CHUNK_ROWS = 4
    index_builder.row_steps = hostile_measures.logs
    prepare = PrepareSettings(model, PruneSettings(), ResizeSettings(min_pixels=32 * 32))
    index_builder.build_index([SourceSettings(data)], prepare, num_workers=1, max_seconds=600.0, show_progress=False)
