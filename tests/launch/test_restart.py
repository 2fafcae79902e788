"""When a run is started again, and when not."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from launch.front import Outcome
from launch.restart import RestartPolicy, furthest_logged_step, run_with_restarts
from launch.stop import StopRequests
from training.exit_codes import FINISHED, RESUMABLE, USER_ERROR


class Starts:
    """A run whose starts end as told: (exit code, step reached), the last one for ever."""

    def __init__(self, *ends: tuple[int, int], was_stopped: bool = False):
        self.ends = list(ends)
        self.was_stopped = was_stopped
        self.step = 0
        self.num_starts = 0

    def start(self) -> Outcome:
        code, self.step = self.ends[min(self.num_starts, len(self.ends) - 1)]
        self.num_starts += 1
        return Outcome(code, self.was_stopped)

    def run(self, num_restarts: int, pause: float = 0.0, stops: StopRequests | None = None) -> int:
        policy = RestartPolicy(num_restarts, pause)
        return run_with_restarts(self.start, policy, stops or StopRequests(), lambda: self.step)


def test_without_restarts_the_first_code_is_the_last():
    starts = Starts((7, 10), (0, 20))
    assert starts.run(0) == 7
    assert starts.num_starts == 1


def test_crash_and_preemption_are_restarted_until_the_run_has_finished():
    starts = Starts((1, 10), (RESUMABLE, 20), (137, 30), (FINISHED, 40))
    assert starts.run(1) == FINISHED
    assert starts.num_starts == 4


def test_run_that_stands_still_is_given_up_and_progress_starts_the_count_anew():
    starts = Starts((1, 5), (1, 5), (1, 9), (1, 9), (1, 9), (1, 9))
    assert starts.run(2) == 1
    # 5: progress; 5: idle 1; 9: progress; 9, 9: idle 1, 2; 9: idle 3 > 2
    assert starts.num_starts == 6


def test_step_reached_again_is_no_progress():
    starts = Starts((1, 50), (1, 10), (1, 50), (0, 60))
    assert starts.run(1) == 1
    assert starts.num_starts == 3


@pytest.mark.parametrize("code", [FINISHED, USER_ERROR])
def test_finished_runs_and_user_errors_are_not_restarted(code):
    starts = Starts((code, 10))
    assert starts.run(5) == code
    assert starts.num_starts == 1


def test_run_that_was_asked_to_stop_is_not_restarted():
    starts = Starts((RESUMABLE, 10), was_stopped=True)
    assert starts.run(5) == RESUMABLE
    assert starts.num_starts == 1


def test_stop_during_the_pause_ends_resumable():
    starts = Starts((1, 10))
    with StopRequests() as stops:
        signal.setitimer(signal.ITIMER_REAL, 0)
        earlier = signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGTERM))
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            assert starts.run(5, pause=3600.0, stops=stops) == RESUMABLE
        finally:
            signal.signal(signal.SIGALRM, earlier)
    assert starts.num_starts == 1


def test_furthest_step_is_read_from_the_end_and_past_a_line_cut_short(tmp_path: Path):
    assert furthest_logged_step(tmp_path) == 0
    rows = "".join(f'{{"step": {step}, "loss": 1.5}}\n' for step in range(1, 9001))
    (tmp_path / "metrics.jsonl").write_text(rows + '{"step": 9001, "lo')
    assert furthest_logged_step(tmp_path) == 9000
