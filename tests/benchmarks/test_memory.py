"""The table of what fits on which GPU is the estimate's, and the page has it as it is printed."""

from __future__ import annotations

from benchmarks.memory import models, rows
from benchmarks.parts.record import markdown_table
from tests.ranks import ROOT


def test_the_page_shows_what_the_estimate_says():
    page = (ROOT / "docs" / "first_gpu_run.md").read_text()
    configs = dict(models())
    assert all(name in page for name in configs)
    for name, num_ranks in (("Qwen3-VL-2B", 8), ("Qwen3.5-2B", 32)):
        line = markdown_table(list(rows(name, configs[name], num_ranks))).splitlines()[-1]
        assert line in page, "write it anew: python -m benchmarks.memory"
