"""Progress of long work on standard error: one status line on a terminal, now and then a plain line elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from typing import TextIO

from runner.cli.terminal import ERASE_TO_END, StatusLine, is_screen
from runner.units import duration, rate, size

SECONDS_BETWEEN_LINES = 10.0
# The time left is said after `EARLY_SECONDS` if `EARLY_SHARE` of the bytes are done by then, else after `LATE_SECONDS`:
# the pace of the first moments would give hours for what takes minutes.
EARLY_SECONDS, EARLY_SHARE, LATE_SECONDS = 2.0, 0.01, 10.0


# A rate is that of the last so many seconds: an hour without a line says nothing of the rest.
SECONDS_OF_RATE = 60.0


class WorkProgress(AbstractContextManager["WorkProgress"]):
    """A `toolkit.io.progress.Progress` that shows how much of all files is done; several threads may call it."""

    def __init__(
        self,
        verb: str,
        total: int,
        notes: TextIO | None = None,
        *,
        only: Collection[str] | None = None,
        received: Callable[[], int] | None = None,
    ) -> None:
        """`verb` names the work ("converting"), `total` is the bytes of all files; by default on standard error.

        With `only`, no other files count. With `received`, which gives the bytes over the network so far, these alone
        make the rate: what earlier runs have left is read at the disk's.
        """
        self._verb, self._total, self._only = verb, total, only
        self._done_by_file: dict[str, int] = {}
        self._received = received
        # Times, and the bytes done by then that make the rate.
        self._samples = deque([(time.monotonic(), 0 if received is None else received())])
        self._lock = threading.Lock()
        notes = notes or sys.stderr
        self._is_terminal, self._shown = is_screen(notes), -1
        self._line = StatusLine(notes, seconds_between_lines=SECONDS_BETWEEN_LINES)

    def __exit__(self, *_: object) -> None:
        self._line.clear()

    def __call__(self, file: str, done: int, total: int) -> None:
        with self._lock:
            if self._only is not None and file not in self._only:
                return
            self._done_by_file[file] = done
            if self._received is not None:
                self._sample(self._received())
            all_done = sum(self._done_by_file.values())
            # While nothing comes, a log needs no lines; on a terminal the rate falls.
            if self._line.is_due and (self._is_terminal or all_done != self._shown):
                self._line.show(*self._statuses(all_done, file))
                self._shown = all_done

    def _statuses(self, done: int, file: str) -> tuple[str, ...]:
        """What is done, the longest text first: a narrow terminal gets the figures that matter."""
        then, before = self._samples[0]
        seconds = max(time.monotonic() - then, 1e-9)
        pace = ((done if self._received is None else self._received()) - before) / seconds
        share = done / self._total if self._total else 1.0
        is_known = seconds >= LATE_SECONDS or (seconds >= EARLY_SECONDS and share >= EARLY_SHARE)
        left = max(0, self._total - done)
        to_come = f", {duration(round(left / pace))} left" if pace and is_known else ""
        figures = f"{size(done)} of {size(self._total)} ({share:.0%})"
        return (
            f"{self._verb}: {figures}, {file}, {rate(pace)}{to_come}",
            f"{figures}, {rate(pace)}{to_come}",
            f"{figures}{to_come}",
            f"{share:.0%}{to_come}",
            f"{share:.0%}",
        )

    def _sample(self, received: int) -> None:
        now, samples = time.monotonic(), self._samples
        if received == samples[0][1] and len(samples) == 1:
            # Nothing has come yet: what is there is being hashed.
            samples[0] = now, received
        elif now - samples[-1][0] >= 1:
            samples.append((now, received))
        # The first one stays at least as old as the rate needs.
        while len(samples) > 2 and samples[1][0] <= now - SECONDS_OF_RATE:
            samples.popleft()


def print_above_status(text: str) -> None:
    """Print a line on standard error in the place of a status, which comes again below it."""
    print(f"\r{ERASE_TO_END}{text}" if is_screen(sys.stderr) else text, file=sys.stderr, flush=True)
