"""Threads that compute: each takes its share of one task, and the task is done when all of them are."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
from queue import SimpleQueue

# Called as share(index, count) for every index below count, at the same time.
Share = Callable[[int, int], None]


@cache
def workers(count: int) -> Workers:
    """The `count` threads that all models of this process share."""
    return Workers(count)


class Workers:
    """`count` threads, of which the caller's own is one."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._orders = [
            SimpleQueue[tuple[Share, SimpleQueue[BaseException | None]]]() for _ in range(1, count)
        ]
        for index, orders in enumerate(self._orders, start=1):
            threading.Thread(target=_work, args=(index, count, orders), daemon=True).start()

    def run(self, share: Share) -> None:
        """Run every share; raises what one of them raised.

        An interruption of the caller leaves the other threads at work on their shares: a share holds what it needs.
        """
        done: SimpleQueue[BaseException | None] = SimpleQueue()
        for orders in self._orders:
            orders.put((share, done))
        share(0, self.count)
        failures = [error for _ in self._orders if (error := done.get())]
        if failures:
            raise failures[0]


def _work(
    index: int, count: int, orders: SimpleQueue[tuple[Share, SimpleQueue[BaseException | None]]]
) -> None:
    while True:
        share, done = orders.get()
        try:
            share(index, count)
        except BaseException as error:
            done.put(error)
        else:
            done.put(None)
        del share, done  # nothing is kept alive while waiting
