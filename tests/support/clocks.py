"""A clock that runs faster than the system's, so that hours of waiting take moments."""

from __future__ import annotations

import threading

from toolkit.hub.line import Clock


class FastClock(Clock):
    """`factor` seconds go by on it in each real one."""

    def __init__(self, factor: float) -> None:
        self._factor = factor
        self._start, self._start_time = super().monotonic(), super().time()

    def monotonic(self) -> float:
        return (super().monotonic() - self._start) * self._factor

    def time(self) -> float:
        return self._start_time + self.monotonic()

    def wait(self, condition: threading.Condition, seconds: float) -> None:
        condition.wait(seconds / self._factor)
