"""Threads that compute: whoever has a product to make invites them, and who is free takes part."""

from __future__ import annotations

import atexit
import threading
from collections.abc import Callable
from functools import cache
from queue import SimpleQueue


@cache
def workers(count: int) -> Workers:
    """The `count` threads that all models of this process share."""
    return Workers(count)


class Workers:
    """`count` threads, of which the caller's own is one."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._invitations = [SimpleQueue[Callable[[], None] | None]() for _ in range(1, count)]
        for invitations in self._invitations:
            thread = threading.Thread(target=_work, args=(invitations,), daemon=True)
            thread.start()
            atexit.register(_end, invitations, thread)

    def invite(self, take_part: Callable[[], None]) -> None:
        """Have every other thread call `take_part` as soon as it can; nobody waits for that here.

        It must do nothing when it comes too late, hold what it needs, and not raise.
        """
        for invitations in self._invitations:
            invitations.put(take_part)


def _work(invitations: SimpleQueue[Callable[[], None] | None]) -> None:
    while take_part := invitations.get():
        take_part()
        del take_part  # nothing is kept alive while waiting


def _end(invitations: SimpleQueue[Callable[[], None] | None], thread: threading.Thread) -> None:
    """Before the interpreter goes: it would end the thread inside of torch, whose C++ then aborts the process."""
    invitations.put(None)
    thread.join()
