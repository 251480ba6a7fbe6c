"""Progress of long work on standard error: one status line on a terminal, now and then a plain line elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from contextlib import AbstractContextManager
from typing import TextIO

from runner.cli.terminal import StatusLine
from runner.units import duration, rate, size

SECONDS_BETWEEN_LINES = 10.0
# The time left is said after `EARLY_SECONDS` if `EARLY_SHARE` of the bytes are done by then, else after `LATE_SECONDS`:
# the pace of the first moments would give hours for what takes minutes.
EARLY_SECONDS, EARLY_SHARE, LATE_SECONDS = 2.0, 0.01, 10.0


class WorkProgress(AbstractContextManager["WorkProgress"]):
    """A `toolkit.io.progress.Progress` that shows how much of all files is done; several threads may call it."""

    def __init__(self, verb: str, total: int, notes: TextIO | None = None) -> None:
        """`verb` names the work ("converting"), `total` is the bytes of all files; by default on standard error."""
        self._verb, self._total = verb, total
        self._done_by_file: dict[str, int] = {}
        self._start = time.monotonic()
        self._lock = threading.Lock()
        self._line = StatusLine(notes or sys.stderr, seconds_between_lines=SECONDS_BETWEEN_LINES)

    def __exit__(self, *_: object) -> None:
        self._line.clear()

    def __call__(self, file: str, done: int, total: int) -> None:
        with self._lock:
            self._done_by_file[file] = done
            if self._line.is_due:
                self._line.show(f"{self._verb}: {self._status(sum(self._done_by_file.values()), file)}")

    def _status(self, done: int, file: str) -> str:
        seconds = max(time.monotonic() - self._start, 1e-9)
        share = done / self._total if self._total else 1.0
        text = f"{size(done)} of {size(self._total)} ({share:.0%}), {file}, {rate(done / seconds)}"
        is_known = seconds >= LATE_SECONDS or (seconds >= EARLY_SECONDS and share >= EARLY_SHARE)
        return f"{text}, {duration(round(seconds / share - seconds))} left" if done and is_known else text
