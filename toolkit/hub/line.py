"""The line to the Hub as all threads of one command share it: its rate, and how long an outage is waited out.

    something comes ──failure──> pauses of retry.py ──nothing comes──> outage, said ──something comes──> over, said
                                                                         └──patience used up──> error

An outage is waited out only once something has come: before that the address, the proxy or the name may be wrong.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from runner.units import duration

# A pause of this many seconds is said, and an outage once it has lasted so long; again while it lasts.
SAID_FROM = 3.0
SECONDS_BETWEEN_WORDS = 600.0
# Seconds between looks at whether a pause is still wanted.
SECONDS_BETWEEN_LOOKS = 0.25
# Unused time of a limited rate that may be made up for: a late wake-up of a thread, and no burst that others notice.
SECONDS_OF_CREDIT = 0.05


def nothing() -> None:
    """Look at nothing."""


class Clock:
    """The system's time; tests give another."""

    def monotonic(self) -> float:
        """Seconds of a clock that is never set."""
        return time.monotonic()

    def time(self) -> float:
        """Seconds since 1970."""
        return time.time()

    def wait(self, condition: threading.Condition, seconds: float) -> None:
        """Wait until somebody notifies, at most so long."""
        condition.wait(seconds)


class Line:
    """Counts what comes, limits it to a rate, and makes every pause between two tries.

    `received` is the number of bytes of files that have come. Methods get `check`, which is called now and then while
    they wait, and may raise to end that.
    """

    def __init__(
        self,
        *,
        patience: float = 0.0,
        rate: float | None = None,
        say: Callable[[str], object] = lambda text: None,
        clock: Clock | None = None,
    ) -> None:
        """`patience` is the longest outage in seconds, `rate` the most bytes a second, and `say` gets sentences."""
        self.received = 0
        self.clock = clock or Clock()
        self._patience, self._rate, self._say = patience, rate, say
        self._changed = threading.Condition()
        self._has_come = False
        # Of the clock, or None if something has come since the last failure; the second one for people.
        self._failing_since: float | None = None
        self._failing_since_time = 0.0
        self._is_outage = False
        self._outages_over = 0
        self._said = ""
        self._said_until = 0.0
        self._free_at = self.clock.monotonic()

    @property
    def block(self) -> int:
        """The most bytes to read at a time, so that a slow rate stays an even one."""
        return 2**18 if self._rate is None else max(2**12, min(2**18, int(self._rate / 50)))

    def came(self, nbytes: int = 0) -> None:
        """Something sound has come; `nbytes` of a file."""
        with self._changed:
            self.received += nbytes
            self._has_come = True
            if self._failing_since is None:
                return
            seconds, self._failing_since = self.clock.monotonic() - self._failing_since, None
            self._said, was_outage, self._is_outage = "", self._is_outage, False
            if was_outage:
                self._outages_over += 1
                self._changed.notify_all()
        if was_outage:
            self._say(f"something comes again, after {duration(round(seconds))}")

    def patience_left(self) -> float:
        """Seconds for which failures are still waited out; counts from the first one since something came."""
        with self._changed:
            now = self.clock.monotonic()
            if self._failing_since is None:
                self._failing_since, self._failing_since_time = now, self.clock.time()
            return self._patience - (now - self._failing_since) if self._has_come else 0.0

    def pause(self, seconds: float, why: str, check: Callable[[], None], *, asked: bool = False) -> None:
        """Wait before another try, shorter if an outage ends, unless the other side has `asked` for the pause."""
        with self._changed:
            text, outages = self._words(seconds, why, asked), self._outages_over
        if text:
            self._say(text)
        self._wait(seconds, check, lambda: not asked and self._outages_over > outages)

    def keep_rate(self, nbytes: int, check: Callable[[], None] = nothing) -> None:
        """Wait until `nbytes` more may be read. One token bucket for all connections."""
        if self._rate is None:
            return
        with self._changed:
            now = self.clock.monotonic()
            self._free_at = max(self._free_at, now - SECONDS_OF_CREDIT) + nbytes / self._rate
            seconds = self._free_at - now
        self._wait(seconds, check)

    def wake(self) -> None:
        """Have everybody who waits call its `check` now."""
        with self._changed:
            self._changed.notify_all()

    def _words(self, seconds: float, why: str, asked: bool) -> str:
        """What to say of a pause, or "" if it is short, or another thread has said the same."""
        now, time_now = self.clock.monotonic(), self.clock.time()
        since = now if self._failing_since is None else self._failing_since
        left = self._patience - (now - since)
        if self._has_come and left > 0 and now - since >= SAID_FROM and not asked:
            is_new, self._is_outage = not self._is_outage, True
            if not is_new and now < self._said_until:
                return ""
            self._said_until = now + SECONDS_BETWEEN_WORDS
            since_then, until = (
                _clock_time(t, time_now) for t in (self._failing_since_time, time_now + left)
            )
            return f"{why}; nothing has come since {since_then}, trying again until {until}"
        end = now + seconds
        if seconds < SAID_FROM or (why == self._said and end <= self._said_until + 1):
            return ""
        self._said, self._said_until = why, end
        until = _clock_time(time_now + seconds, time_now)
        return f"{why}; waiting until {until}, as asked" if asked else f"{why}; trying again at {until}"

    def _wait(
        self, seconds: float, check: Callable[[], None], is_over: Callable[[], bool] = lambda: False
    ) -> None:
        end = self.clock.monotonic() + seconds
        while True:
            check()
            with self._changed:
                left = end - self.clock.monotonic()
                if left <= 0 or is_over():
                    return
                self.clock.wait(self._changed, min(left, SECONDS_BETWEEN_LOOKS))


def _clock_time(then: float, now: float) -> str:
    """ "14:13:05", with the date if that is another day."""
    one, other = time.localtime(then), time.localtime(now)
    is_today = (one.tm_year, one.tm_yday) == (other.tm_year, other.tm_yday)
    return time.strftime("%H:%M:%S" if is_today else "%Y-%m-%d %H:%M", one)
