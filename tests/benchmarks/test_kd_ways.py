"""The arithmetic of the record of benchmarks.kd_ways: learning rates by validation, shares of the gap, paired tests."""

from __future__ import annotations

import json

from benchmarks.parts.kd_ways_report import chosen, sign_flip_p, tables
from benchmarks.parts.one_rank import run_as_rank


def found() -> dict:
    def cells(values: list[float]) -> dict:
        return {seed: {"val": value, "test": value / 2} for seed, value in enumerate(values)}

    ways = {
        ("noisy", "CE"): {1e-3: cells([0.5, 0.7]), 2e-3: cells([0.9, 0.2])},
        ("noisy", "KD"): {1e-3: cells([0.8, 0.8]), 2e-3: cells([0.9, 0.9])},
    }
    return {"untrained": {seed: {"none": 0.6, "pred2d": 0.1} for seed in (0, 1)}, "ways": ways}


def test_every_way_takes_the_learning_rate_that_validation_likes_over_all_seeds():
    assert chosen(found()) == {("noisy", "CE"): (1e-3, [0.25, 0.35]), ("noisy", "KD"): (2e-3, [0.45, 0.45])}
    text = tables(found())
    assert "| noisy | KD | 0.002 | 45.0% ± 0.0% | 70% | 45.0%, 45.0% |" in text
    assert "| KD (noisy) against CE (noisy) | +15.0 | +20.0, +10.0 | 0.500 |" in text


def test_the_ways_through_the_real_trainer(tmp_path):
    """One step of each: a Full model, its answers, three ways, the record and the picture."""
    sizes = ["--full-steps", "1", "--full-records", "8", "--steps", "1", "--records", "8", "--held-out", "4"]
    sizes += ["--seeds", "1"]
    ways = ["--lrs", "1e-3", "--only", "noisy", "bare", "--ways", "KD", "teacher's answers", "on-policy"]
    where = ["--folder", str(tmp_path / "cells"), "--out", str(tmp_path)]
    assert run_as_rank("benchmarks.kd_ways", [*sizes, *ways, *where]) == 0
    record = json.loads((tmp_path / "kd_ways.json").read_text())
    assert list(record["cells"]) == ["noisy: KD", "bare: teacher's answers", "bare: on-policy"]
    assert all(list(by_lr["0.001"]) == ["0"] for by_lr in record["cells"].values())
    assert (tmp_path / "kd_ways.png").exists()


def test_the_paired_test_counts_flips_of_signs():
    assert sign_flip_p([1.0, 2.0, 3.0]) == 0.25
    assert sign_flip_p([1.0, -1.0]) == 1.0
    assert sign_flip_p([0.1] * 5) == 2 / 32
