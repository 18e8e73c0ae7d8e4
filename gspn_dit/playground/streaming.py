"""Pictures that show themselves while they form: work in a thread of its own, seen by whoever reads on."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")

SHORTEST_WAIT = 0.15
"""Seconds between two pictures of one drawing."""
SHARE = 0.25
"""Of the time that may go into showing."""


class Abandoned(Exception):
    """Nobody reads on."""


class _End(Generic[T]):
    """The last thing in a queue: how the work ended."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


def stream(work: Callable[[Callable[[T], None]], None]) -> Iterator[T]:
    """Yield what `work(emit)` emits, as it does; its error is raised here.

    When the iterator is closed, the next call of `emit` ends the work.
    """
    items: queue.SimpleQueue[T | _End[T]] = queue.SimpleQueue()
    closed = threading.Event()

    def emit(item: T) -> None:
        if closed.is_set():
            raise Abandoned
        items.put(item)

    def run() -> None:
        try:
            work(emit)
            items.put(_End(None))
        except BaseException as error:
            items.put(_End(error))

    threading.Thread(target=run, daemon=True).start()
    try:
        while not isinstance(item := items.get(), _End):
            yield item
        if item.error is not None:
            raise item.error
    finally:
        closed.set()


class Pace:
    """Tells which pictures to show: not more often than `SHORTEST_WAIT`, nor for more than `SHARE` of the time."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock, self._next = clock, 0.0

    def show(self, make: Callable[[], object]) -> None:
        """Call `make` if it is time for it."""
        start = self._clock()
        if start < self._next:
            return
        make()
        now = self._clock()
        self._next = now + max(SHORTEST_WAIT, (now - start) * (1 / SHARE - 1))
