"""What long work reports while it runs; the terminal's side of it is `terminal.py`."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

# Called with a file's name, its bytes done so far, and its bytes in all.
Progress = Callable[[str, int, int], None]
# Begins a piece of work by its verb and its bytes, and ends with it.
Work = Callable[[str, int], AbstractContextManager[Progress]]

SECONDS_BETWEEN_REPORTS = 0.1


def silent(file: str, done: int, total: int) -> None:
    """Report nothing."""


def silent_work(verb: str, total: int) -> AbstractContextManager[Progress]:
    """Report nothing of a piece of work."""
    return nullcontext(silent)


class FileProgress:
    """One file's progress, told at most ten times a second, and always at the end."""

    def __init__(self, progress: Progress, file: str, total: int) -> None:
        self._progress, self._file, self._total = progress, file, total
        self._next = 0.0

    def __call__(self, done: int) -> None:
        now = time.monotonic()
        if now >= self._next or done == self._total:
            self._next = now + SECONDS_BETWEEN_REPORTS
            self._progress(self._file, done, self._total)
