"""Builds that are killed at random moments end as if they never were, and make nothing again that was on the disk."""

import random

import pytest

from tests.training.killed_builds import BUILDS, kill_and_finish


@pytest.mark.ranks
@pytest.mark.parametrize("name", BUILDS)
def test_a_killed_build_goes_on_where_it_was(name, tmp_path, toy_folder):
    make = BUILDS[name]
    killed = make(tmp_path / "killed", toy_folder)
    counts = kill_and_finish(killed, 2, random.Random(8))
    assert 0 < counts[0] < killed.num_units, "the first kill found it at work"
    undisturbed = make(tmp_path / "undisturbed", toy_folder)
    undisturbed.main()
    assert killed.result() == undisturbed.result()
