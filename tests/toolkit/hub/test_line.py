"""The line that all connections of a command share: its rate, its patience, and what is said of pauses."""

from __future__ import annotations

import re
import threading
import time

import pytest

from runner.units import parse_duration
from tests.support.clocks import FastClock
from toolkit.hub.line import SECONDS_OF_CREDIT, Clock, Line

TIME = r"\d\d:\d\d:\d\d"


class Steps(Clock):
    """A clock for one thread. It moves only when the thread waits, and wakes it `late` seconds too late."""

    def __init__(self, late: float = 0.0) -> None:
        self.now, self._late = 1000.0, late

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return 1_790_000_000 + self.now

    def wait(self, condition: threading.Condition, seconds: float) -> None:
        self.now += seconds + self._late


@pytest.mark.parametrize("rate", [20_000, 3_000_000, 20_000_000, 500_000_000])
@pytest.mark.parametrize("late", [0.0, 0.02])
def test_a_long_transfer_has_the_rate_that_was_asked_for_and_no_burst_above_it(rate, late) -> None:
    clock, times = Steps(late), []
    line = Line(rate=rate, clock=clock)
    total = 20 * rate
    sent, began = 0, clock.now
    while sent < total:
        line.keep_rate(line.block)
        sent += line.block
        times.append((clock.now, sent))
    assert total / (clock.now - began) == pytest.approx(rate, rel=0.05)
    first = 0
    for last, (now, sent) in enumerate(times):
        while times[first][0] < now - 1.0:
            first += 1
        in_a_second = sent - (times[first][1] - line.block)
        assert in_a_second <= rate * (1 + SECONDS_OF_CREDIT) + line.block, last


def test_idle_time_is_not_made_up_for() -> None:
    clock = Steps()
    line = Line(rate=1_000_000, clock=clock)
    clock.now += 3600
    began = clock.now
    for _ in range(100):
        line.keep_rate(10_000)
    assert clock.now - began >= 1.0 - SECONDS_OF_CREDIT - 1e-6


def test_all_connections_share_one_rate() -> None:
    clock = FastClock(50)
    line = Line(rate=1_000_000, clock=clock)
    began = clock.monotonic()

    def take() -> None:
        for _ in range(50):
            line.keep_rate(20_000)

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # 8 MB at 1 MB/s.
    assert 7.6 <= clock.monotonic() - began <= 9.5


def test_without_a_rate_nothing_waits() -> None:
    clock = Steps()
    line = Line(clock=clock)
    line.keep_rate(10**12)
    assert clock.now == 1000.0


def test_a_wait_for_the_rate_can_be_ended() -> None:
    clock, looks = Steps(), []
    line = Line(rate=10, clock=clock)

    def check() -> None:
        looks.append(clock.now)
        if len(looks) > 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        line.keep_rate(10**6, check)
    assert clock.now < 1002


def test_patience_counts_from_the_first_failure_since_something_came() -> None:
    clock = Steps()
    line = Line(patience=100.0, clock=clock)
    assert line.patience_left() == 0
    line.came(10)
    clock.now += 50
    assert line.patience_left() == 100
    clock.now += 30
    assert line.patience_left() == 70
    line.came()
    assert line.patience_left() == 100
    assert line.received == 10


def test_an_outage_is_said_again_now_and_then() -> None:
    clock, said = Steps(), []
    line = Line(patience=parse_duration("12h"), say=said.append, clock=clock)
    line.came()
    for seconds in (0.5, 1.0, 2.0):
        line.patience_left()
        line.pause(seconds, "hub.example cannot be reached: no route", lambda: None)
    while line.patience_left() > 0:
        line.pause(60.0, "hub.example cannot be reached: no route", lambda: None)
    assert len(said) == 72
    gone = "hub.example cannot be reached: no route; nothing has come since [-0-9: ]+, trying again until "
    assert all(re.match(gone, text) for text in said)


def test_short_pauses_are_not_said_and_the_same_pause_of_all_threads_once() -> None:
    clock, said = Steps(), []
    line = Line(say=said.append, clock=clock)
    line.pause(1.0, "a drop", lambda: None)
    for _ in range(8):
        began = clock.now
        line.pause(20.0, "hub.example answered 429", lambda: None, asked=True)
        clock.now = began
    line.pause(20.0, "another answered 429", lambda: None, asked=True)
    assert len(said) == 2
    assert re.fullmatch(rf"hub.example answered 429; waiting until {TIME}, as asked", said[0])


def test_a_pause_ends_when_the_outage_does_unless_it_was_asked_for() -> None:
    clock, ended = FastClock(100), []
    line = Line(patience=1e6, clock=clock)
    line.came()
    line.patience_left()
    condition = threading.Condition()
    with condition:
        clock.wait(condition, 5.0)

    def wait(asked: bool) -> None:
        line.pause(60.0, "no route", lambda: None, asked=asked)
        ended.append((asked, clock.monotonic()))

    threads = [threading.Thread(target=wait, args=(asked,)) for asked in (False, True)]
    began = clock.monotonic()
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    line.came()
    for thread in threads:
        thread.join()
    (first, early), (second, late) = ended
    assert (first, second) == (False, True)
    assert early - began < 50 and late - began >= 60
