"""Pictures that are seen while they form."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from gspn_dit.playground.streaming import Pace, stream


def test_what_is_emitted_arrives_in_order_before_the_work_ends() -> None:
    seen = threading.Event()

    def work(emit: Callable[[int], None]) -> None:
        emit(1)
        assert seen.wait(10)
        emit(2)

    items = stream(work)
    assert next(items) == 1
    seen.set()
    assert list(items) == [2]


def test_an_error_is_raised_where_the_pictures_are_read() -> None:
    def work(emit: Callable[[int], None]) -> None:
        emit(1)
        raise ValueError("a reason")

    items = stream(work)
    assert next(items) == 1
    with pytest.raises(ValueError, match="a reason"):
        next(items)


def test_work_ends_when_nobody_reads_on() -> None:
    ended = threading.Event()

    def work(emit: Callable[[int], None]) -> None:
        try:
            while True:
                emit(0)
        finally:
            ended.set()

    items = stream(work)
    next(items)
    items.close()  # type: ignore[attr-defined]
    assert ended.wait(10)


@pytest.mark.parametrize("seconds, shown", [(0.01, [0, 15, 30, 45, 60]), (0.2, [0, 60])])
def test_pictures_are_no_more_than_seven_a_second_and_take_a_quarter_of_the_time(
    seconds: float, shown: list[int]
) -> None:
    """Between steps of 10 ms: pictures of 10 ms are 160 ms apart, and those of 200 ms are 800 ms apart."""
    now, made = 0.0, []
    pace = Pace(lambda: now)

    def make() -> None:
        nonlocal now
        made.append(step)
        now = round(now + seconds, 6)

    step = 0
    while step <= 61:
        pace.show(make)
        now, step = round(now + 0.01, 6), step + 1
    assert made == shown
