"""What ranks tell each other: every one of them hears the same, also of an error that one alone has met."""

from __future__ import annotations

import pytest
import torch

from tests.ranks import run_ranks
from tests.training.ranks_program import TIMEOUT_SECONDS, answers, errors
from training.distributed.ranks import Ranks


@pytest.mark.ranks
def test_two_ranks_decide_meet_errors_and_wait_together(tmp_path):
    result = run_ranks("tests.training.ranks_program", 2, tmp_path / "notes.json")
    first, second = result["notes"]
    for name, value in {
        "from_first": {"rank": 0, "calls": None},
        "any": [False, True],
        "any_of": [True, False, True],
        "sum": [3.0, 20.0],
        "max": [2.0, 10.0],
        "min": [1.0, 10.0],
        "gather": [0, 1],
        "here": 2,
        "first refuses": "ConfigError: no room",
        "all refuse": "ConfigError: no data",
        "second refuses": "UserError: rank 1: no such file",
        "sum after": [1],
    }.items():
        assert (first[name], second[name]) == (value, value), name
    assert (first["calls"], second["calls"]) == (1, 0)
    assert (first["agree"], second["agree"]) == (0, 1)
    assert (first["untouched"], second["untouched"]) == ([1.0, 10.0], [2.0, 10.0])
    assert (first["first breaks"], second["first breaks"]) == (
        "KeyError: 'x'",
        "UserError: the first rank ended with KeyError and says why",
    )
    assert (first["first's own"], second["first's own"]) == (
        "RankError: disk full",
        "UserError: the first rank ended with RankError and says why",
    )
    assert (first["second breaks"], second["second breaks"]) == (
        "UserError: rank 1: ended with KeyError and says why",
        "KeyError: 'x'",
    )
    # The one stops waiting for a rank that is slow, the other for one that does not come.
    patient, _ = result["waited"]
    assert patient > TIMEOUT_SECONDS


def test_one_rank_asks_nobody():
    alone = Ranks(0, 1, 0, torch.device("cpu"))
    said = answers(alone)
    assert said["calls"] == 1
    assert said["any_of"] == (True, False, False)
    assert said["sum"] == said["max"] == said["min"] == [1.0, 10.0]
    assert said["gather"] == [0]
    assert errors(alone)["first refuses"] == "ConfigError: no room"
    assert errors(alone)["all refuse"] == "ConfigError: no data"
    alone.barrier()


def test_ranks_that_were_not_joined_are_an_error_and_no_silent_answer():
    with pytest.raises(AssertionError, match="join_ranks"):
        Ranks(0, 2, 0, torch.device("cpu")).any(True)
