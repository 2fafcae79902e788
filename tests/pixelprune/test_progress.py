"""Progress: lines in a log file, a bar on a terminal, nothing on ranks that do not speak; the clock is the test's."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from pixelprune.command import ProgressLine, progress
from tests.test_house import FILES, ROOT


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def console(*, is_terminal: bool = False) -> Console:
    return Console(file=io.StringIO(), force_terminal=is_terminal, width=100, color_system=None, markup=False)


def lines(line: ProgressLine) -> list[str]:
    return line.console.file.getvalue().splitlines()


def test_a_log_file_gets_a_line_every_15_seconds_and_the_last_one(clock):
    with ProgressLine("step", 10, start=2, console=console()) as line:
        for num_done in range(3, 11):
            clock[0] += 5
            line.update(num_done, f"loss {num_done}")
    # Two steps behind the first took 10 seconds; five are left.
    assert lines(line) == ["step 5/10  loss 5  ETA 0:25", "step 8/10  loss 8  ETA 0:10", "step 10/10  loss 10"]


def test_the_first_line_comes_at_once_where_it_is_asked_for(clock):
    line = ProgressLine("step", 2000, speaks_at_once=True, console=console())
    clock[0] += 400
    line.update(1)
    clock[0] += 4
    line.update(2)
    assert lines(line) == ["step 1/2000"], "how long the others take is not known from the first"
    line.close()
    assert lines(line)[1:] == ["step 2/2000  ETA 2:13:12"], "what an early end left unsaid"
    line.close()
    assert len(lines(line)) == 2


def test_what_ends_with_a_result_says_no_last_line(clock):
    with ProgressLine("held-out loss, step", 4, ends_silently=True, console=console()) as line:
        line.advance()
        clock[0] += 15
        line.advance()
        line.advance(2)
    assert lines(line) == ["held-out loss, step 2/4  ETA 0:30"]


def test_bytes_are_shown_as_a_share_and_end_once(clock):
    with ProgressLine("a [1].json", 1 << 20, in_percent=True, console=console()) as line:
        line.update(0)
        clock[0] += 20
        line.update(1 << 18, "1 of 1 records")
        line.update(1 << 20, "2 of 3 records")
        line.update(1 << 20, "3 of 4 records")
        assert lines(line) == ["a [1].json 25%  1 of 1 records  ETA 1:00"]
    assert lines(line)[1:] == ["a [1].json 100%  3 of 4 records"]


@pytest.mark.parametrize("is_terminal", [False, True])
def test_nothing_is_said_by_silent_ranks_or_of_no_work(is_terminal):
    for line in (
        ProgressLine("index", 3, is_shown=False, console=console(is_terminal=is_terminal)),
        ProgressLine("index", 0, console=console(is_terminal=is_terminal)),
    ):
        with line:
            line.advance()
            line.say("note")
        assert lines(line) == []


def test_a_terminal_gets_a_bar_with_text_in_brackets_whole():
    with ProgressLine("[pages]", 4, console=console(is_terminal=True)) as line:
        line.advance(3, "[3] images")
        line.advance()
        line.say("a [note] above")
    text = line.console.file.getvalue()
    assert "[pages]" in text
    assert "4/4" in text
    assert "a [note] above" in text


def test_a_terminal_shows_the_newest_of_several_bars():
    shared = console(is_terminal=True)
    with ProgressLine("step", 4, console=shared) as run:
        with ProgressLine("held-out loss, step", 2, console=shared) as evaluation:
            assert (run._bar.live.is_started, evaluation._bar.live.is_started) == (False, True)
            evaluation.advance(2)
        assert (run._bar.live.is_started, evaluation._bar.live.is_started) == (True, False)
        evaluation.close()  # again
        run.advance(4)
    assert not run._bar.live.is_started
    assert "4/4" in shared.file.getvalue()


def test_one_file_sets_up_bars():
    owners = {str(path.relative_to(ROOT)) for path in FILES if "rich.progress" in path.read_text()}
    assert owners == {"pixelprune/command/progress.py"}
