"""Turns at the language model: one run at a time, first come first served, and whoever waits is told for how many."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Condition

_NOTICE = 1.0  # seconds after which whoever waits is told again, which is also when a page that was closed gives up


class Turns:
    """A queue that all sessions share."""

    def __init__(self) -> None:
        self._queue: list[object] = []
        self._moved = Condition()

    @contextmanager
    def take(self, wait: Callable[[int], None]) -> Iterator[None]:
        """Wait for one's turn and hold it; not to be taken by who holds one.

        Args:
            wait: is called with the number of those before; what it raises gives the place in the queue up.
        """
        ticket = object()
        with self._moved:
            self._queue.append(ticket)
        try:
            while before := self._before(ticket):
                wait(before)
                with self._moved:
                    self._moved.wait_for(lambda before=before: self._queue.index(ticket) != before, _NOTICE)
            yield
        finally:
            with self._moved:
                self._queue.remove(ticket)
                self._moved.notify_all()

    def _before(self, ticket: object) -> int:
        with self._moved:
            return self._queue.index(ticket)
