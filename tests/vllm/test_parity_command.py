"""`python -m pixelprune parity`: a deployment that serves what was trained, and one that does not."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.vllm.engine import ENVIRONMENT, ROOT, draw_images, needs_vllm

pytestmark = needs_vllm
ENGINE = '{"max_model_len": 1024, "enforce_eager": true}'


def parity(folder, images, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pixelprune", "parity", str(folder), *map(str, images)]
    return subprocess.run(
        [*command, "--max-tokens", "4", "--engine", ENGINE],
        cwd=ROOT,
        env=os.environ | ENVIRONMENT | {"PYTHONPATH": str(ROOT), "COLUMNS": "160"} | environment,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )


def test_parity_finds_a_plugin_that_was_left_out(served_folder, tmp_path):
    drawn = draw_images(tmp_path)
    images = [drawn["wide"], drawn["odd"]]
    same = parity(served_folder(), images)
    assert same.returncode == 0, same.stdout + same.stderr
    assert same.stdout.count("same") == 2
    without = parity(served_folder(), images, VLLM_PLUGINS="")
    assert without.returncode == 1, without.stdout + without.stderr
    assert without.stdout.count("DIFFERENT") == 2
    assert "left out by VLLM_PLUGINS" in without.stdout
