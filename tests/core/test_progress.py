"""Bars that stay out of each other's way, and work that stops in time."""

from __future__ import annotations

import time

import pytest

from ecliptic.core.progress import OutOfTime, Progress, time_limit, track


def test_work_stops_at_the_step_after_its_time():
    done = []

    def count() -> None:
        for i in track(range(1000), "counting"):
            done.append(i)
            time.sleep(0.01)

    with time_limit(0.05), pytest.raises(OutOfTime, match="counting: stopped"):
        count()
    assert 2 <= len(done) <= 20
    assert list(track(range(3), "counting")) == [0, 1, 2]  # the limit went with its block


def test_of_two_limits_the_earlier_counts():
    for limits in ((60, 0.0), (0.0, 60)):
        with time_limit(limits[0]), time_limit(limits[1]), Progress("waiting") as bar:
            time.sleep(0.01)
            with pytest.raises(OutOfTime):
                bar.advance()
    with time_limit(60), Progress("waiting") as bar:
        bar.advance()


def test_a_bar_inside_another_is_silent(capsys):
    with Progress("outer", 2, shown=True) as outer:
        with Progress("inner", 2, shown=True) as inner:
            inner.advance()
            assert inner._bar is None
        outer.advance()
    with Progress("next", 1, shown=True) as bar:
        assert bar._bar is not None
    printed = capsys.readouterr().err
    assert "outer" in printed
    assert "inner" not in printed
