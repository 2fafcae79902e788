"""Two hosts for real, the short form: one of them is lost in the midst of a run, which then ends on the other."""

from __future__ import annotations

import subprocess
import sys

import pytest

from benchmarks.parts.two_hosts import why_not
from tests.ranks import ROOT

pytestmark = [pytest.mark.ranks, pytest.mark.skipif(bool(why_not()), reason=f"no two hosts here: {why_not()}")]


def test_a_run_outlives_one_of_its_hosts(tmp_path):
    """The drill ends with 0 when losses and weights are those of a run that nobody disturbed, to the bit."""
    command = [sys.executable, "-m", "benchmarks.hosts", "--no-record", "--keep", str(tmp_path)]
    done = subprocess.run(
        [*command, "--only", "a host, for good"], cwd=ROOT, capture_output=True, text=True, timeout=1500, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "'equal bits': True" in done.stdout
    assert "Connection" in (tmp_path / "hosts-0.log").read_text(), "the first host's rank met the loss"
