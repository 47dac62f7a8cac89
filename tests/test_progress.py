"""Long work says how far it is, and what it says of the time left is of this run alone."""

import sys
from types import SimpleNamespace

import pytest

from nas.progress import progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that a progress sees."""
    now = [1000.0]
    monkeypatch.setattr("nas.progress.time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def test_lines_come_after_4_seconds_then_every_15_and_count_what_this_run_did(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with progress("work", 100, done=50) as tick:
        for seconds, amount in ((3.9, 5), (4.0, 0), (18.9, 5), (19.0, 0), (33.9, 10), (40.0, 30)):
            clock[0] = 1000 + seconds
            tick(amount)
    lines = ["work: 55 %, 36 s left", "work: 60 %, 1 min 16 s left", "work: done in 40 s"]
    assert capsys.readouterr().err.splitlines() == lines, "5 took 4 s and leave 45, then 10 took 19 s and leave 40"


def test_the_time_left_is_not_guessed_from_next_to_nothing(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress("work", 100) as tick:
        clock[0] += 5
        tick(2)
        assert not capsys.readouterr().err
        tick(1)
        assert capsys.readouterr().err == "work: 3 %, 2 min 42 s left\n"


def test_what_was_done_before_is_not_told_again(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("work", 5, done=5):
        pass
    assert not capsys.readouterr().err


def test_on_a_terminal_there_is_a_bar_that_begins_where_the_work_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    with progress("work", 10, done=5) as tick:
        tick(3)
    err = capsys.readouterr().err
    assert "work" in err and "80%" in err and "done in" not in err
